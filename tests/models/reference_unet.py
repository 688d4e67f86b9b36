"""The U-Net once more, as plainly as it can be written, for the variants that diffusers has not.

Written from the description of the published models (ADM's residual up- and downsampling blocks, a fixed number of
heads at every level, time added or as scale and shift), not from our classes: no modules, explicit softmax, explicit
statistics. Weights come by our names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def unet(
    w: Weights,
    x: Tensor,
    t: Tensor,
    *,
    channels: int,
    levels: int,
    blocks: int,
    attention_levels: Sequence[int],
    heads: int,
    scale_shift: bool,
) -> Tensor:
    """The prediction at x [B, in, H, W], t [B]."""
    half = channels // 2
    # In fp32 and in this order of operations: at t = 981 another order is another embedding by 1e-6.
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency
    time = torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype)
    time = linear(w, "time_embedding.linear_1", time)
    time = linear(w, "time_embedding.linear_2", silu(time))

    def block(name: str, h: Tensor, change: str = "") -> Tensor:
        return residual(w, name, h, time, scale_shift, change)

    h = conv(w, "conv_in", x)
    skips = [h]
    for level in range(levels):
        for i in range(blocks):
            h = block(f"down_blocks.{level}.resnets.{i}", h)
            if level in attention_levels:
                h = self_attention(w, f"down_blocks.{level}.attentions.{i}", h, heads)
            skips.append(h)
        if level < levels - 1:
            h = block(f"down_blocks.{level}.resample", h, "down")
            skips.append(h)
    h = block("mid_block.resnets.0", h)
    h = self_attention(w, "mid_block.attentions.0", h, heads)
    h = block("mid_block.resnets.1", h)
    for number in range(levels):
        level = levels - 1 - number
        for i in range(blocks + 1):
            h = block(f"up_blocks.{number}.resnets.{i}", torch.cat([h, skips.pop()], 1))
            if level in attention_levels:
                h = self_attention(w, f"up_blocks.{number}.attentions.{i}", h, heads)
        if level > 0:
            h = block(f"up_blocks.{number}.resample", h, "up")
    return conv(w, "conv_out", silu(norm(w, "conv_norm_out", h)))


def residual(w: Weights, name: str, x: Tensor, time: Tensor, scale_shift: bool, change: str) -> Tensor:
    """norm, SiLU, (resample), conv; time; norm, SiLU, conv; plus the (resampled, projected) input."""
    h = silu(norm(w, f"{name}.norm1", x))
    h, x = resample(h, change), resample(x, change)
    h = conv(w, f"{name}.conv1", h)
    told = linear(w, f"{name}.time_emb_proj", silu(time))[:, :, None, None]
    if scale_shift:
        scale, shift = told[:, : h.shape[1]], told[:, h.shape[1] :]
        h = norm(w, f"{name}.norm2", h) * (1 + scale) + shift
    else:
        h = norm(w, f"{name}.norm2", h + told)
    h = conv(w, f"{name}.conv2", silu(h))
    if f"{name}.conv_shortcut.weight" in w:
        x = conv(w, f"{name}.conv_shortcut", x)
    return x + h


def resample(x: Tensor, change: str) -> Tensor:
    """Means of 2x2 positions, or each position four times."""
    if change == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    if change == "up":
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return x


def self_attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    b, c, height, width = x.shape
    tokens = norm(w, f"{name}.group_norm", x).reshape(b, c, -1).transpose(1, 2)
    q, k, v = (
        linear(w, f"{name}.to_{part}", tokens).reshape(b, -1, heads, c // heads).transpose(1, 2)
        for part in "qkv"
    )
    score = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(c // heads)
    weight = torch.exp(score - score.amax(-1, keepdim=True))
    weight = weight / weight.sum(-1, keepdim=True)
    out = torch.einsum("bhij,bhjd->bhid", weight, v).transpose(1, 2).reshape(b, -1, c)
    return x + linear(w, f"{name}.to_out", out).transpose(1, 2).reshape(b, c, height, width)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Group normalisation of 32 groups, eps 1e-5."""
    grouped = x.reshape(x.shape[0], 32, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    weight, bias = (w[f"{name}.{part}"][None, :, None, None] for part in ("weight", "bias"))
    return scaled.reshape(x.shape) * weight + bias


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)
