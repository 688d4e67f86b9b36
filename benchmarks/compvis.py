"""The networks as the first public implementation of latent diffusion computes them, written for comparison.

What matters for speed is kept: attention as two einsums round a softmax over a score matrix in memory, 1x1
convolutions as projections, norms that go through fp32 and hand a copy to a separate activation, residual sums
into new tensors. Written from the description in the paper and measurements of its behaviour; module names are
ours, so that weights can be shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Norm(nn.GroupNorm):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(32, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, eps: float, time: int | None) -> None:
        super().__init__()
        self.norm1 = Norm(inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs) if time else None
        self.norm2 = Norm(outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if self.time_emb_proj is None or time is None:  # the autoencoder's
            h = self.conv1(swish(self.norm1(x)))
            h = self.conv2(swish(self.norm2(h)))
        else:
            h = self.conv1(F.silu(self.norm1(x)))
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
            h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (self._split(f) for f in (self.to_q(x), self.to_k(source), self.to_v(source)))
        scores = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bij,bjd->bid", scores.softmax(dim=-1), v)
        batch, length = x.shape[0], x.shape[1]
        out = out.reshape(batch, self.heads, length, -1).permute(0, 2, 1, 3).reshape(batch, length, -1)
        return self.to_out(out)

    def _split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = x.reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3)
        return x.reshape(batch * self.heads, length, -1)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class Block(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([Block(channels, context, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return self.proj_out(h) + x


class PixelAttention(nn.Module):
    """One head over all positions of the autoencoder's lowest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = Norm(channels, 1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.to_q, self.to_k, self.to_v))
        weights = (torch.bmm(q.permute(0, 2, 1), k) * q.shape[1] ** -0.5).softmax(dim=2)
        return x + self.to_out(torch.bmm(v, weights.permute(0, 2, 1)).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        stride, padding = {"down": (2, 1), "one_sided": (2, 0), "up": (1, 1)}[kind]
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.kind == "one_sided":
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Stage(nn.Module):
    """The blocks of one resolution; a list of modules that the networks below walk through."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.resample: nn.Module | None = None


class TimeEmbedding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies[None]
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class UNet(nn.Module):
    """`checkpointed`: every residual and transformer block is computed again in the backward pass."""

    def __init__(
        self,
        channels: int,
        mult: Sequence[int],
        attention: Sequence[int],
        heads: int,
        context: int,
        checkpointed: bool,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        time, sizes = 4 * channels, [channels * m for m in mult]
        self.time_embedding = TimeEmbedding(channels)
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, current = [channels], channels
        for level, size in enumerate(sizes):
            stage = Stage()
            for _ in range(2):
                stage.resnets.append(Residual(current, size, 1e-5, time))
                if level in attention:
                    stage.attentions.append(Transformer(size, context, heads))
                current = size
                skips.append(size)
            if level < len(sizes) - 1:
                stage.resample = Resample(size, "down")
                skips.append(size)
            self.down_blocks.append(stage)
        self.mid_block = Stage()
        self.mid_block.resnets.extend(Residual(current, current, 1e-5, time) for _ in range(2))
        self.mid_block.attentions.append(Transformer(current, context, heads))
        for level in reversed(range(len(sizes))):
            stage = Stage()
            for _ in range(3):
                stage.resnets.append(Residual(current + skips.pop(), sizes[level], 1e-5, time))
                if level in attention:
                    stage.attentions.append(Transformer(sizes[level], context, heads))
                current = sizes[level]
            if level > 0:
                stage.resample = Resample(current, "up")
            self.up_blocks.append(stage)
        self.conv_norm_out = Norm(current, 1e-5)
        self.conv_out = nn.Conv2d(current, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        time = self.time_embedding(t)
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down_blocks:
            for index in range(len(stage.resnets)):
                h = self._block(stage, index, h, time, context)
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h)
                skips.append(h)
        for index in range(2):
            h = self._block(self.mid_block, index, h, time, context)
        for stage in self.up_blocks:
            for index in range(len(stage.resnets)):
                h = self._block(stage, index, torch.cat([h, skips.pop()], dim=1), time, context)
            if stage.resample is not None:
                h = stage.resample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _block(self, stage: Any, index: int, h: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self._run(stage.resnets[index], h, time)
        return self._run(stage.attentions[index], h, context) if index < len(stage.attentions) else h

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        return checkpoint(module, *inputs, use_reentrant=True) if self.checkpointed else module(*inputs)


class Half(nn.Module):
    """Encoder ("down") or decoder ("up") of the autoencoder."""

    def __init__(self, inputs: int, outputs: int, sizes: Sequence[int], kind: str) -> None:
        super().__init__()
        down = kind == "down"
        current = sizes[0] if down else sizes[-1]
        self.conv_in = nn.Conv2d(inputs, current, 3, padding=1)
        stages = nn.ModuleList()
        for level, size in enumerate(sizes if down else reversed(sizes)):
            stage = Stage()
            for _ in range(2 if down else 3):
                stage.resnets.append(Residual(current, size, 1e-6, None))
                current = size
            if level < len(sizes) - 1:
                stage.resample = Resample(size, "one_sided" if down else "up")
            stages.append(stage)
        self.down = down
        if down:
            self.down_blocks = stages
        else:
            self.up_blocks = stages
        self.mid_block = Stage()
        self.mid_block.resnets.extend(Residual(sizes[-1], sizes[-1], 1e-6, None) for _ in range(2))
        self.mid_block.attentions.append(PixelAttention(sizes[-1]))
        self.conv_norm_out = Norm(current, 1e-6)
        self.conv_out = nn.Conv2d(current, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        h = self._stages(h, self.down_blocks) if self.down else self._middle(h)
        h = self._middle(h) if self.down else self._stages(h, self.up_blocks)
        return self.conv_out(swish(self.conv_norm_out(h)))

    def _middle(self, h: Tensor) -> Tensor:
        first, last = self.mid_block.resnets
        return last(self.mid_block.attentions[0](first(h)))

    def _stages(self, h: Tensor, stages: nn.ModuleList) -> Tensor:
        for stage in stages:
            for resnet in stage.resnets:
                h = resnet(h)
            if stage.resample is not None:
                h = stage.resample(h)
        return h


class Autoencoder(nn.Module):
    def __init__(self, latent: int, channels: int, mult: Sequence[int]) -> None:
        super().__init__()
        sizes = [channels * m for m in mult]
        self.encoder = Half(3, 2 * latent, sizes, "down")
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = Half(latent, 3, sizes, "up")

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction of a posterior sample, KL of each sample to the standard normal)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=[1, 2, 3])
        return self.decoder(self.post_quant_conv(mean + (0.5 * logvar).exp() * noise)), kl
