"""Layers that the U-Net and the autoencoders share: norms, residual blocks, resampling, time embedding.

Every layer initialises its own weights inside its constructor and nobody touches them afterwards: DeepSpeed's
`zero.Init` cuts a layer's parameters into shards as soon as its constructor has ended, so a parent that
reinitialised a child would write into nothing.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ldmscale.models.recompute import norm_silu

NORM_GROUPS = 32  # of every published network; narrow ones need fewer, or a group is a single channel

Checkpointing = Literal["off", "selective", "full"]


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half-precision types, the type itself otherwise (fp64 stays fp64, for parity checks)."""
    return torch.promote_types(dtype, torch.float32)


def takes_half(x: Tensor, weight: Tensor) -> bool:
    """Whether the norm's kernel is given `x` as it is.

    CUDA's kernels accumulate half-precision maps in fp32 themselves: casts to fp32 and back would triple the memory
    traffic. Those of CPUs keep their statistics in the type of the map, which is too coarse for the backward pass.
    """
    return x.is_cuda and x.dtype == weight.dtype


class GroupNorm(nn.GroupNorm):
    """Group normalisation that accumulates in fp32 at least and returns the type it got."""

    def __init__(self, channels: int, *, eps: float, groups: int = NORM_GROUPS) -> None:
        if channels % groups:
            raise ValueError(
                f"a normalised layer has {channels} channels, which {groups} groups do not divide: "
                f"choose channels that are multiples of {groups}"
            )
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if takes_half(x, self.weight):
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        wide = at_least_fp32(x.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).to(x.dtype)


class NormSiLU(GroupNorm):
    """Group normalisation followed by SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        if takes_half(
            x, self.weight
        ):  # nothing is recomputed: that costs CUDA more time than it saves memory
            return F.silu(super().forward(x))
        return norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis that accumulates in fp32 at least and returns the type it got."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if takes_half(x, self.weight):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        wide = at_least_fp32(x.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts as zero, so that the residual branch it ends starts as nothing."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear layer that starts as zero, so that the residual branch it ends starts as nothing."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SmallNormalEmbedding(nn.Embedding):
    """A table of vectors drawn from N(0, 0.02^2), as in the published text encoder."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


def dropout_layer(rate: float) -> nn.Module:
    """Dropout, or nothing at all at rate 0: PyTorch's own draws and multiplies even then."""
    return nn.Dropout(rate) if rate > 0 else nn.Identity()


def has_dropout(network: nn.Module) -> bool:
    """Whether the network draws dropout masks while it trains."""
    rates = (
        module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", None)
        for module in network.modules()
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _keep_attention(context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Attention is the dearest to compute again and keeps little: its output and one number a row."""
    name: str = operator.name()
    kept = "attention" in name or "flash" in name  # PyTorch's on all devices, and those of xformers
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(block: nn.Module, checkpointing: Checkpointing, *inputs: Tensor | None) -> Tensor:
    """Calls `block`. With "full" only its inputs are kept for backward, which computes the rest once more.

    With "selective" the results of attention are kept too.
    """
    if checkpointing == "off" or not torch.is_grad_enabled():
        result: Tensor = block(*inputs)
    elif checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
        result = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    else:
        result = checkpoint(block, *inputs, use_reentrant=False)
    return result


def check_checkpointing(value: str) -> None:
    if value not in get_args(Checkpointing):
        raise ValueError(f"checkpointing is {value!r}; expected off, selective or full")


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the time step, cosines first: frequencies exp(-ln(10000) k / (channels/2)). Always fp32.

    Order and base as in the released models (which follow Vaswani et al. 2017, section 3.5). t [B] -> [B,
    channels].
    """
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)  # [half]
    frequencies = torch.exp(-math.log(10000.0) * k / half)  # [half]
    angles = t.to(torch.float32)[:, None] * frequencies[None, :]  # [B, half]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)  # [B, 2 half]
    return F.pad(embedding, (0, channels - 2 * half))  # [B, channels]


class TimeEmbedding(nn.Module):
    """The time step as a vector: sinusoids in fp32, then two linear layers in the parameters' own type."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t [B], integers or fp32 (bf16 cannot tell step 998 from 1000) -> [B, out_channels] in `dtype`."""
        x = timestep_embedding(t, self.channels).to(dtype)  # [B, channels]
        result: Tensor = self.linear_2(F.silu(self.linear_1(x)))  # [B, out]
        return result


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2.

    The U-Net pads by one on all sides; the autoencoders pad right and bottom only (`one_sided`).
    """

    def __init__(self, channels: int, *, one_sided: bool) -> None:
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.one_sided:
            x = F.pad(x, (0, 1, 0, 1))  # [B, C, H + 1, W + 1]
        result: Tensor = self.conv(x)  # [B, C, H/2, W/2]
        return result


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # [B, C, 2H, 2W]
        return result


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions round a skip, with the time vector added between them.

    `resample` makes it the residual up- or downsampling block of ADM (Dhariwal & Nichol 2021, table 1): both
    the branch (after its first activation) and the skip are averaged down or repeated up, without a
    convolution of their own.

    Args:
        time_channels: width of the activated time vector; None for blocks without time (autoencoders).
        norm_groups: of both norms.
        eps: of both norms: 1e-5 in the released U-Nets, 1e-6 in the released autoencoders.
        scale_shift: the time vector scales and shifts the second norm instead of being added before it (ADM).
        zero_last: start the second convolution at zero (U-Net).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        eps: float,
        norm_groups: int = NORM_GROUPS,
        time_channels: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        zero_last: bool = False,
        resample: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = NormSiLU(in_channels, eps=eps, groups=norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = scale_shift
        self.time_emb_proj: nn.Linear | None = None
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = (GroupNorm if scale_shift else NormSiLU)(out_channels, eps=eps, groups=norm_groups)
        self.dropout = dropout_layer(dropout)
        last = ZeroConv2d if zero_last else nn.Conv2d
        self.conv2 = last(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], time [B, T] (already activated) -> [B, out, H', W']."""
        h: Tensor = self.norm1(x)  # [B, C, H, W]
        h, x = self._resampled(h), self._resampled(x)  # [B, C, H', W']
        h = self.conv1(h)  # [B, out, H', W']
        if self.time_emb_proj is None:
            h = self.norm2(h)  # [B, out, H', W']
        else:
            if time is None:
                raise ValueError(
                    "this block was built with time_channels and was called without the time vector"
                )
            shift = self.time_emb_proj(time)[:, :, None, None]  # [B, out or 2 out, 1, 1]
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)  # [B, out, 1, 1] each
                h = F.silu(self.norm2(h) * (1 + scale) + shift)  # [B, out, H', W']
            else:
                h += shift  # in place: autograd keeps no copy of a convolution's output
                h = self.norm2(h)  # [B, out, H', W']
        result: Tensor = self.conv2(self.dropout(h))  # [B, out, H', W']
        result += x if self.conv_shortcut is None else self.conv_shortcut(x)  # [B, out, H', W']
        return result

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x
