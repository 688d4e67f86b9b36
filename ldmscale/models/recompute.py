"""Operations that keep only their inputs for the backward pass and compute the rest once more there.

Autograd would also keep the normalised map (in fp32, beside an fp32 copy of its input), the activated gate and
their product, in the same time within the noise (docs/benchmarks.md has the memory). None can be differentiated
twice. Under torch.compile they are the plain operations, whose memory the compiler plans itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(group_norm(x)), computed in fp32 at least, in the type of x. x [B, C, H, W] -> [B, C, H, W]."""
    if torch.compiler.is_compiling():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.silu(F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), eps)).to(x.dtype)
    result: Tensor = _NormSiLU.apply(x, weight, bias, groups, eps)  # type: ignore[no-untyped-call]
    return result


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate), x = [value, gate] (Shazeer 2020, with the erf GELU). x [..., 2 D] -> [..., D]."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer of geglu(x). x [..., 2 D], weight [C, D], bias [C] -> [..., C]."""
    if torch.compiler.is_compiling():
        return F.linear(geglu(x), weight, bias)
    result: Tensor = _GegluLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """Contiguous in the layout that group norm's kernels take: on CPUs channels-last stays so."""
    layout = _layout(like)
    x = x.contiguous(memory_format=layout)
    _, c, h, w = x.shape
    last = layout == torch.channels_last
    strides = (c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    # Axes of one element may have any stride, and the kernel on CPUs takes the layout from the strides.
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = _dense(x, x)
        n, c, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        ctx.groups = groups
        out, mean, rstd = torch.native_group_norm(
            x.to(wide), weight.to(wide), bias.to(wide), n, c, positions, groups, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(out, inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide = mean.dtype
        n, c, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        # The norm again, as one scale and one shift for every channel of every sample.
        scale = rstd.repeat_interleave(c // ctx.groups, dim=1) * weight.to(wide)  # [B, C]
        shift = bias.to(wide) - mean.repeat_interleave(c // ctx.groups, dim=1) * scale  # [B, C]
        wide_x = x.to(wide)
        out = torch.addcmul(shift[:, :, None, None], wide_x, scale[:, :, None, None])  # [B, C, H, W]
        grad = _dense(torch.ops.aten.silu_backward(grad.to(wide), out), x)  # [B, C, H, W]
        grads = torch.ops.aten.native_group_norm_backward(
            grad, wide_x, mean, rstd, weight.to(wide), n, c, positions, ctx.groups, ctx.needs_input_grad[:3]
        )
        cast = [None if g is None else g.to(p.dtype) for g, p in zip(grads, (x, weight, bias), strict=True)]
        return (*cast, None, None)


class _GegluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(gate).mul_(value), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [N, C]
        value, gate = x.reshape(rows.shape[0], -1).chunk(2, dim=-1)  # [N, D]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        # The halves of the result hold what is between, so that little more is alive at a time than it.
        for_value, for_gate = out.view(rows.shape[0], -1).chunk(2, dim=-1)
        activated = torch.ops.aten.gelu.out(gate, out=for_gate)  # [N, D]
        for_weight = rows.T @ (activated * value) if ctx.needs_input_grad[1] else None  # [C, D]
        for_bias = rows.sum(0) if ctx.needs_input_grad[2] else None  # [C]
        inner = rows @ weight  # [N, D]
        torch.mul(inner, activated, out=for_value)
        torch.ops.aten.gelu_backward.grad_input(inner.mul_(value), gate, grad_input=for_gate)
        return out, for_weight, for_bias
