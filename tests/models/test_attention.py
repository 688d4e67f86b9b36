"""All attention backends compute the same thing, and the choice of one is explicit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from ldmscale.models.attention import (
    MultiHeadAttention,
    attention,
    current_backend,
    joint_products,
    probe,
    set_backend,
)


@pytest.fixture(autouse=True)
def _backend_is_put_back() -> Iterator[None]:
    before = current_backend()
    yield
    set_backend(before)


@pytest.mark.parametrize("head_channels", [8, 40, 64, 160])
def test_plain_agrees_with_sdpa_forward_and_backward(head_channels: int) -> None:
    result = probe("plain", head_channels, "cpu", torch.float32)
    assert result.forward < 5e-6
    assert result.backward < 5e-6


def test_probe_sees_a_loss_of_precision() -> None:
    exact = probe("plain", 40, "cpu", torch.float32)
    rounded = probe("plain", 40, "cpu", torch.bfloat16)
    assert rounded.forward > 100 * exact.forward
    assert rounded.forward < 0.05


def test_attention_is_the_softmax_average_of_the_values_of_each_head() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    expected = torch.einsum(
        "bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5).softmax(-1), v
    )
    for backend in ("sdpa", "plain"):
        torch.testing.assert_close(attention(q, k, v, backend), expected)


def test_layers_use_the_backend_that_was_set() -> None:
    layer = MultiHeadAttention(32, heads=2, head_channels=16)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    operators = {}
    for backend in ("sdpa", "plain"):
        set_backend(backend)
        with torch.profiler.profile() as profile:
            layer(x)
        operators[backend] = {event.key for event in profile.key_averages()}
    assert "aten::scaled_dot_product_attention" in operators["sdpa"]
    assert "aten::scaled_dot_product_attention" not in operators["plain"]


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of sdpa, xformers, plain"):
        set_backend("flash")  # type: ignore[arg-type]
    assert current_backend() == "sdpa"


def test_xformers_is_refused_where_it_is_not_installed() -> None:
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(ImportError):
            set_backend("xformers")
        assert current_backend() == "sdpa"
    elif torch.cuda.is_available():
        result = probe("xformers", 40, "cuda", torch.bfloat16)
        assert result.forward < 0.05
        assert result.backward < 0.05
    else:
        with pytest.raises(NotImplementedError):  # it has no operator for CPUs
            probe("xformers", 40, "cpu", torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_joint_products_are_those_of_each_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 12, bias=bias, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    upstream = [torch.randn(2, 5, 4, 3, dtype=torch.float64) for _ in layers]

    expected = [
        (x @ layer.weight.T + (layer.bias if bias else 0)).view(2, 5, 4, 3) for layer in layers
    ]  # by hand
    found = joint_products(x, layers, 4)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found, leaves, upstream)
    for g, e in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_a_layer_with_a_hook_is_called_by_itself() -> None:
    """ZeRO-3 gathers the weights of a layer in such a hook: outside of it they are empty."""
    layers = [torch.nn.Linear(6, 12, bias=False) for _ in range(2)]
    weight = layers[1].weight.detach().clone()
    layers[1].weight.data = torch.empty(0)

    def gather(layer: torch.nn.Module, _: object) -> None:
        layer.weight.data = weight

    layers[1].register_forward_pre_hook(gather)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(joint_products(x, layers, 4)[1].flatten(2), x @ weight.T)


def test_a_layer_of_another_kind_is_called_by_itself() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layers = [torch.nn.Linear(6, 12, bias=False), Doubled(6, 12, bias=False)]
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(joint_products(x, layers, 4)[1].flatten(2), 2 * x @ layers[1].weight.T)
