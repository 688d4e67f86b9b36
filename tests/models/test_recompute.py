"""The operations that keep less for the backward pass give the values and gradients of the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity import draw
from torch import Tensor

from ldmscale.models.recompute import geglu_linear, norm_silu
from ldmscale.models.transformer import GatedFeedForward


def plain_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def plain_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def kept_bytes(result: Tensor) -> int:
    node = result.grad_fn
    assert node is not None
    return sum(t.nbytes for t in node.saved_tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norm_silu_has_exact_gradients(layout: torch.memory_format) -> None:
    x = draw(2, 8, 3, 4).contiguous(memory_format=layout).requires_grad_(True)
    weight, bias = draw(8, seed=2).requires_grad_(True), draw(8, seed=3).requires_grad_(True)
    out = norm_silu(x, weight, bias, 4, 1e-6)
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out, plain_norm_silu(x, weight, bias, 4, 1e-6))
    assert torch.autograd.gradcheck(lambda *p: norm_silu(*p, 4, 1e-6), (x, weight, bias))


def test_norm_silu_takes_strided_inputs_and_gradients() -> None:
    found, expected = (draw(2, 3, 4, 16).transpose(1, 3).requires_grad_(True) for _ in range(2))
    weight, bias = draw(16, seed=2), draw(16, seed=3)
    upstream = draw(2, 3, 4, 16, seed=4).transpose(1, 3)
    norm_silu(found, weight, bias, 4, 1e-6).backward(upstream)
    plain_norm_silu(expected, weight, bias, 4, 1e-6).backward(upstream)
    torch.testing.assert_close(found.grad, expected.grad)


def test_norm_silu_of_bf16_computes_in_fp32_and_keeps_bf16() -> None:
    x = draw(2, 32, 16, 16).bfloat16().requires_grad_(True)
    weight, bias = (p.bfloat16().requires_grad_(True) for p in (draw(32, seed=2), draw(32, seed=3)))
    out = norm_silu(x, weight, bias, 4, 1e-6)
    exact = plain_norm_silu(x.float(), weight.float(), bias.float(), 4, 1e-6)
    assert torch.equal(out, exact.bfloat16())
    assert kept_bytes(out) < 1.1 * x.nbytes
    upstream = draw(2, 32, 16, 16, seed=4).bfloat16()
    found = torch.autograd.grad(out, (x, weight, bias), upstream)
    expected = torch.autograd.grad(exact, (x, weight, bias), upstream.float())
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.bfloat16
        torch.testing.assert_close(f, e)


def test_geglu_and_its_linear_layer_have_exact_gradients_and_keep_input_and_weight_only() -> None:
    x, weight, bias = (
        draw(*shape, seed=i).requires_grad_(True) for i, shape in enumerate(((3, 5, 12), (4, 6), (4,)))
    )
    out = geglu_linear(x, weight, bias)
    torch.testing.assert_close(out, plain_geglu(x) @ weight.T + bias)
    assert torch.autograd.gradcheck(geglu_linear, (x, weight, bias))
    assert kept_bytes(out) == x.nbytes + weight.nbytes


def test_dropout_falls_between_geglu_and_its_linear_layer() -> None:
    torch.manual_seed(0)
    feedforward = GatedFeedForward(8, dropout=0.5)
    x = draw(1, 3, 8).float()
    with torch.no_grad():
        feedforward.proj_out.weight.copy_(torch.eye(8, 32))
        feedforward.proj_out.bias.zero_()
    whole = feedforward.eval()(x)
    torch.testing.assert_close(whole, plain_geglu(feedforward.proj_in(x))[..., :8])
    shares = feedforward.train()(x) / whole
    assert set(shares.detach().round(decimals=4).flatten().tolist()) == {0.0, 2.0}


def test_differentiating_twice_is_refused_and_not_silently_wrong() -> None:
    x, weight, bias = draw(3, 12).requires_grad_(True), draw(2, 6), draw(2)
    (first,) = torch.autograd.grad(geglu_linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [0, 1, 7])
def test_norm_silu_takes_one_sample_of_any_stride(layout: torch.memory_format, stride: int) -> None:
    """The axis of a batch of one may have any stride, and the kernel on CPUs takes the layout from the strides."""
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=layout)
    found = x.as_strided(x.shape, (stride, *x.stride()[1:])).detach().requires_grad_()
    expected = x.clone().requires_grad_()
    weight, bias = torch.randn(8), torch.randn(8)
    upstream = torch.randn(1, 8, 4, 4)
    out = norm_silu(found, weight, bias, 4, 1e-6)
    torch.testing.assert_close(out, plain_norm_silu(expected, weight, bias, 4, 1e-6))
    out.backward(upstream)
    plain_norm_silu(expected, weight, bias, 4, 1e-6).backward(upstream)
    torch.testing.assert_close(found.grad, expected.grad)
