"""Attention has one door: `attention(q, k, v)`. Behind it PyTorch's SDPA, xformers, or plain matrix products.

The backend is an explicit choice for the whole process (`set_backend`), never a guess; a run records it.
xformers has no CPU operator and is imported only when it is chosen. `probe` measures a backend against SDPA,
forward and backward.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeGuard, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.layers import dropout_layer

Backend = Literal["sdpa", "xformers", "plain"]

_backend: Backend = "sdpa"


def set_backend(backend: Backend) -> None:
    """Chooses what every attention layer of this process uses from now on.

    Raises:
        ValueError: no such backend.
        ImportError: xformers was chosen and is not installed.
    """
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")
    if backend == "xformers":
        importlib.import_module("xformers.ops")
    _backend = backend


def current_backend() -> Backend:
    """The backend in force."""
    return _backend


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head.

    Args:
        q: [B, L, H, D] queries. k, v: [B, M, H, D] keys and values.
        backend: overrides the choice of the process.

    Returns:
        [B, L, H, D].
    """
    chosen = _backend if backend is None else backend
    if chosen == "xformers":
        ops = importlib.import_module("xformers.ops")  # a dictionary look-up after the first time
        return cast(Tensor, ops.memory_efficient_attention(q, k, v))  # [B, L, H, D]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L or M, D]
    if chosen == "plain":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, L, M]
        out: Tensor = scores.softmax(dim=-1) @ v  # [B, H, L, D]
    else:
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, D]
    return out.transpose(1, 2)  # [B, L, H, D]


def operators_of(backend: Backend, head_channels: int, device: torch.device, dtype: torch.dtype) -> str:
    """Names of the operators that xformers takes, forward and backward; empty for PyTorch's, which has no names for them."""
    if backend != "xformers":
        return ""
    fmha = importlib.import_module("xformers.ops.fmha")
    dispatch = importlib.import_module("xformers.ops.fmha.dispatch")
    x = torch.zeros(1, 64, 1, head_channels, device=device, dtype=dtype)
    inputs = fmha.Inputs(query=x, key=x, value=x)
    # The choice has no public name; the names of the operators do.
    return f"{dispatch._dispatch_fw(inputs, True).NAME}, {dispatch._dispatch_bw(inputs, None).NAME}"


@dataclass(frozen=True)
class Probe:
    """Largest differences between a backend and SDPA, as shares of SDPA's largest value."""

    forward: float
    backward: float


def probe(backend: Backend, head_channels: int, device: torch.device | str, dtype: torch.dtype) -> Probe:
    """Runs `backend` and SDPA (in fp32 at least, the reference) on the same random q, k, v and compares.

    Both the self-attention shape (256 tokens) and the cross-attention shape (77 keys) are tried; the worse
    counts. Whatever the backend raises (no operator for this device, type or head size) is passed on.
    """
    with _whole_digits():
        return _probed(backend, head_channels, device, dtype)


@contextmanager
def _whole_digits() -> Iterator[None]:
    """Without TF32 inside, whose 10 bits are coarser than the differences that `probe` looks for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _probed(backend: Backend, head_channels: int, device: torch.device | str, dtype: torch.dtype) -> Probe:
    worst = Probe(0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    for keys in (256, 77):
        shapes = ((2, 256, 4, head_channels), (2, keys, 4, head_channels), (2, keys, 4, head_channels))
        drawn = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        expected = _value_and_gradients("sdpa", [x.to(wide) for x in drawn], upstream.to(wide))
        found = _value_and_gradients(backend, drawn, upstream)
        errors = [_share(f, e) for f, e in zip(found, expected, strict=True)]
        worst = Probe(max(worst.forward, errors[0]), max(worst.backward, *errors[1:]))
    return worst


def _share(found: Tensor, expected: Tensor) -> float:
    """Largest difference in shares of the largest expected value; infinite where `found` is not finite."""
    share = float((found - expected).abs().max() / expected.abs().max())
    return share if math.isfinite(share) else math.inf  # comparisons would pass over NaN


def _value_and_gradients(backend: Backend, qkv: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(True) for x in qkv]
    out = attention(leaves[0], leaves[1], leaves[2], backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def joint_products(x: Tensor, layers: Sequence[nn.Module], heads: int) -> tuple[Tensor, ...]:
    """What each of several linear layers of equal shape makes of `x`, in heads: one matrix product in place of several.

    A layer that something hooks into is called by itself: ZeRO-3 gathers the weights of a layer when it is called.

    Args:
        x: [B, L, C].
        layers: with weights [H D, C].
        heads: H.

    Returns:
        One [B, L, H, D] per layer.
    """
    plain = [layer for layer in layers if _is_plain_linear(layer)]
    if len(plain) < len(layers):
        return tuple(layer(x).unflatten(-1, (heads, -1)) for layer in layers)
    weight = torch.cat([layer.weight for layer in plain])  # [N H D, C]
    biased = plain[0].bias is not None
    bias = torch.cat([layer.bias for layer in plain]) if biased else None  # [N H D]
    out = F.linear(x, weight, bias)  # [B, L, N H D]
    return out.view(*out.shape[:-1], len(plain), heads, -1).unbind(-3)


def _is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a call of `layer` does no more than multiply by its weight and add its bias."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_hooks)


class MultiHeadAttention(nn.Module):
    """Projections round `attention`: self-attention, or cross-attention when a context is given.

    Queries, keys and values have no bias, the output has one, as in the released models.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_channels: int,
        context_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width or width, inner, bias=False)
        self.to_v = nn.Linear(context_width or width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, L, C], context [B, M, K] or None for x itself -> [B, L, C]."""
        if context is None:
            q, k, v = joint_products(x, (self.to_q, self.to_k, self.to_v), self.heads)  # [B, L, H, D] each
        else:
            q = self.to_q(x).unflatten(-1, (self.heads, -1))  # [B, L, H, D]
            k, v = joint_products(context, (self.to_k, self.to_v), self.heads)  # [B, M, H, D] each
        out = attention(q, k, v).flatten(2)  # [B, L, H D]
        result: Tensor = self.dropout(self.to_out(out))  # [B, L, C]
        return result
