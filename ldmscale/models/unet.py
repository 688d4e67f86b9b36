"""The denoising U-Net of latent diffusion: residual blocks, attention at chosen levels, skips across.

Rombach et al. 2022, section 3.2 and tables 12-15 (the released sizes are in conf/unet/). With `context_dim`
the attention blocks are spatial transformers that also read the context; without it, plain self-attention.
Level 0 is the full resolution of the latent, each further level has half the height and width. Module names
follow diffusers where it has such a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.layers import (
    NORM_GROUPS,
    Checkpointing,
    Downsample,
    NormSiLU,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    ZeroConv2d,
    check_checkpointing,
    run_block,
)
from ldmscale.models.transformer import SpatialAttention, SpatialTransformer

EPS = 1e-5


class UNet(nn.Module):
    """Predicts the noise (or whatever the target is) of a noisy latent at time t.

    Args:
        in_channels: channels of the first convolution, including those of `concat`.
        out_channels: channels of the prediction.
        channels: channels of level 0 before `channel_mult`; the sinusoids of time have as many.
        channel_mult: one factor a level; channels times it is rounded, since others have widths like 64 and 96.
        blocks_per_level: residual blocks of a level on the way down (one more on the way up).
        attention_levels: levels whose residual blocks are each followed by attention. The middle always has
            it.
        heads: number of heads at every level; or
        head_channels: size of a head at every level. Exactly one of the two.
        context_dim: width D of the context; None for a network that reads none.
        transformer_depth: transformer blocks in one spatial transformer.
        residual_updown: change resolution by residual blocks instead of single convolutions.
        scale_shift_norm: time scales and shifts the second norm of a residual block instead of being added.
        norm_groups: of every group normalisation; 32 in the published models.
        num_classes: adds a table of class vectors to the time vector; forward then needs `labels`.
        checkpointing: "full" keeps only the inputs of residual and attention blocks for the backward pass,
            "selective" the results of attention too.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: Sequence[float],
        blocks_per_level: int,
        attention_levels: Sequence[int],
        heads: int | None = None,
        head_channels: int | None = None,
        context_dim: int | None = None,
        transformer_depth: int = 1,
        residual_updown: bool = False,
        scale_shift_norm: bool = False,
        num_classes: int | None = None,
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        check_checkpointing(checkpointing)
        _check_levels(attention_levels, len(channel_mult))
        self.checkpointing: Checkpointing = checkpointing
        self.channels = channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.context_dim = context_dim
        time_channels = 4 * channels
        sizes = [round(channels * m) for m in channel_mult]

        def resnet(
            inputs: int, outputs: int, resample: Literal["none", "down", "up"] = "none"
        ) -> ResnetBlock:
            return ResnetBlock(
                inputs,
                outputs,
                eps=EPS,
                norm_groups=norm_groups,
                time_channels=time_channels,
                scale_shift=scale_shift_norm,
                dropout=dropout,
                zero_last=True,
                resample=resample,
            )

        def attention(size: int) -> nn.Module:
            count, width = heads_of(size, heads, head_channels)
            if context_dim is None:
                return SpatialAttention(size, heads=count, eps=EPS, zero_last=True, norm_groups=norm_groups)
            return SpatialTransformer(
                size,
                heads=count,
                head_channels=width,
                context_dim=context_dim,
                depth=transformer_depth,
                dropout=dropout,
                norm_groups=norm_groups,
            )

        self.time_embedding = TimeEmbedding(channels, time_channels)
        self.class_embedding = nn.Embedding(num_classes, time_channels) if num_classes is not None else None
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [channels]  # channels of every feature map that a later block concatenates
        current = channels
        for level, size in enumerate(sizes):
            last = level == len(sizes) - 1
            group = Level(checkpointing)
            for _ in range(blocks_per_level):
                group.add(resnet(current, size), attention(size) if level in attention_levels else None)
                current = size
                skips.append(current)
            if not last:
                group.resample_by(
                    resnet(size, size, "down") if residual_updown else Downsample(size, one_sided=False)
                )
                skips.append(current)
            self.down_blocks.append(group)

        self.mid_block = Level(checkpointing)
        self.mid_block.add(resnet(current, current), attention(current))
        self.mid_block.add(resnet(current, current), None)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(sizes))):
            size = sizes[level]
            group = Level(checkpointing)
            for _ in range(blocks_per_level + 1):
                joined = current + skips.pop()
                group.add(resnet(joined, size), attention(size) if level in attention_levels else None)
                current = size
            if level > 0:
                group.resample_by(resnet(size, size, "up") if residual_updown else Upsample(size))
            self.up_blocks.append(group)

        self.conv_norm_out = NormSiLU(current, eps=EPS, groups=norm_groups)
        self.conv_out = ZeroConv2d(current, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        concat: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The prediction at x.

        Args:
            x: [B, C, H, W] noisy latent in the parameters' type; H and W divisible by 2^(levels - 1).
            t: [B] time step, integers or fp32.
            context: [B, L, D], exactly when the network has a context_dim.
            concat: [B, K, H, W] conditioning image joined to x (C + K = in_channels).
            labels: [B] int64 class numbers, exactly when the network has num_classes.

        Returns:
            [B, out_channels, H, W].
        """
        x = self._checked_input(x, concat)  # [B, in, H, W]
        time = self.time_embedding(t, x.dtype)  # [B, T]
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError("this network was built with num_classes and was called without labels")
            time = time + self.class_embedding(labels)  # [B, T]
        time = F.silu(time)  # [B, T]

        h = self.conv_in(x)  # [B, channels, H, W]
        skips = [h]
        for group in cast("list[Level]", self.down_blocks):
            for index in range(len(group.resnets)):
                h = group.block(index, h, time, context)  # [B, size, H_l, W_l]
                skips.append(h)
            if group.resample is not None:
                h = group.resampled(h, time)  # [B, size, H_l / 2, W_l / 2]
                skips.append(h)
        for index in range(len(self.mid_block.resnets)):
            h = self.mid_block.block(index, h, time, context)  # [B, size, H_l, W_l]
        for group in cast("list[Level]", self.up_blocks):
            for index in range(len(group.resnets)):
                h = torch.cat([h, skips.pop()], dim=1)  # [B, C + skip, H_l, W_l]
                h = group.block(index, h, time, context)  # [B, size, H_l, W_l]
            if group.resample is not None:
                h = group.resampled(h, time)  # [B, size, 2 H_l, 2 W_l]
        result: Tensor = self.conv_out(self.conv_norm_out(h))  # [B, out, H, W]
        return result

    def _checked_input(self, x: Tensor, concat: Tensor | None) -> Tensor:
        if concat is not None:
            x = torch.cat([x, concat], dim=1)  # [B, in, H, W]
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"the input has {x.shape[1]} channels (concat included), the network takes {self.in_channels}"
            )
        step = 2 ** (len(self.down_blocks) - 1)
        if x.shape[2] % step or x.shape[3] % step:
            raise ValueError(
                f"the latent is {x.shape[2]}x{x.shape[3]}; height and width must be multiples of {step}"
            )
        return x


class Level(nn.Module):
    """The blocks of one resolution. It holds them; the order in which skips come and go is the U-Net's."""

    def __init__(self, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.checkpointing: Checkpointing = checkpointing
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.resample: nn.Module | None = None

    def add(self, resnet: ResnetBlock, attention: nn.Module | None) -> None:
        self.resnets.append(resnet)
        if attention is not None:
            self.attentions.append(attention)

    def resample_by(self, resample: nn.Module) -> None:
        self.resample = resample

    def block(self, index: int, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """Residual block `index` and its attention, where it has one: [B, C, H, W] -> [B, size, H, W]."""
        x = run_block(self.resnets[index], self.checkpointing, x, time)
        if index < len(self.attentions):
            x = run_block(self.attentions[index], self.checkpointing, x, context)
        return x

    def resampled(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2] or [B, C, 2H, 2W]; only residual resampling reads the time."""
        assert self.resample is not None
        if isinstance(self.resample, ResnetBlock):
            return run_block(self.resample, self.checkpointing, x, time)
        result: Tensor = self.resample(x)
        return result


def heads_of(size: int, heads: int | None, head_channels: int | None) -> tuple[int, int]:
    """(number of heads, size of a head) of an attention with `size` channels.

    Raises:
        ValueError: both or neither were given, or they do not divide the channels.
    """
    if (heads is None) == (head_channels is None):
        raise ValueError(f"heads={heads} and head_channels={head_channels}: give exactly one of the two")
    part = heads if heads is not None else head_channels
    assert part is not None
    if part < 1 or size % part:
        name = "heads" if heads is not None else "head_channels"
        raise ValueError(f"{name}={part} does not divide a level of {size} channels")
    return (part, size // part) if heads is not None else (size // part, part)


def _check_levels(attention_levels: Sequence[int], levels: int) -> None:
    wrong = sorted(level for level in attention_levels if not 0 <= level < levels)
    if wrong:
        raise ValueError(
            f"attention_levels names {wrong}, but channel_mult makes levels 0 to {levels - 1} "
            "(0 = full latent resolution)"
        )
