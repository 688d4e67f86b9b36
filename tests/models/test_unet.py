"""What a U-Net refuses, how it starts, and that checkpointing changes nothing but memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from parity import randomise
from torch.utils._python_dispatch import TorchDispatchMode

from ldmscale.models.unet import UNet

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": 32,
    "channel_mult": (1, 2),
    "blocks_per_level": 1,
    "attention_levels": (0, 1),
    "heads": 2,
    "context_dim": 16,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": None}, "give exactly one"),
        ({"head_channels": 16}, "give exactly one"),
        ({"heads": 5}, "heads=5 does not divide a level of 32 channels"),
        ({"heads": None, "head_channels": 48}, "head_channels=48 does not divide"),
        ({"attention_levels": (0, 2)}, r"names \[2\], but channel_mult makes levels 0 to 1"),
        ({"channels": 24}, "multiples of 32"),
        ({"checkpointing": "some"}, "expected off, selective or full"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **changes})


def test_calls_that_do_not_fit_are_refused() -> None:
    network = UNet(**SMALL)
    x, t, context = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 3, 16)
    with pytest.raises(ValueError, match="without a context"):
        network(x, t)
    with pytest.raises(ValueError, match="multiples of 2"):
        network(x[..., :7], t, context)
    with pytest.raises(ValueError, match="has 7 channels"):
        network(x, t, context, concat=x[:, :3])
    unconditional = UNet(**{**SMALL, "context_dim": None})
    with pytest.raises(ValueError, match="with a context"):
        unconditional(x, t, context)


def test_a_fresh_network_predicts_zero() -> None:
    out = UNet(**SMALL)(torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 3, 16))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("residual", [False, True])
def test_checkpointing_gives_bit_equal_gradients(dropout: float, residual: bool) -> None:
    gradients = []
    for checkpointing in ("off", "selective", "full"):
        network = UNet(**SMALL, dropout=dropout, residual_updown=residual, checkpointing=checkpointing)
        randomise(network)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, 8, 8, generator=generator)
        context = torch.randn(2, 3, 16, generator=generator, requires_grad=True)
        torch.manual_seed(5)  # of dropout
        network(x, torch.tensor([1, 900]), context).square().mean().backward()
        gradients.append([context.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


class Executed(TorchDispatchMode):
    """Counts the operators that are really executed: what comes out of a cache never gets here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_everything_again_but_attention() -> None:
    calls = {}
    for checkpointing in ("off", "selective", "full"):
        network = UNet(**SMALL, checkpointing=checkpointing)
        with Executed() as executed:
            network(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 3, 16)).sum().backward()
        attention = executed.counts["aten::_scaled_dot_product_flash_attention_for_cpu"]
        calls[checkpointing] = attention, executed.counts["aten::native_layer_norm"]
    attention, norms = calls["off"]
    assert attention > 0
    assert calls["full"] == (2 * attention, 2 * norms)
    assert calls["selective"] == (attention, 2 * norms)


def saved_elements(network: UNet) -> int:
    sizes: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 3, 16))
    return sum(sizes)


def test_checkpointing_keeps_fewer_tensors_for_backward() -> None:
    kept = {}
    for checkpointing in ("off", "full"):
        network = UNet(**SMALL, checkpointing=checkpointing)
        kept[checkpointing] = saved_elements(network)
    assert kept["full"] < 0.6 * kept["off"]


def test_bf16_follows_fp32_with_norms_and_time_in_fp32() -> None:
    network = UNet(**SMALL)
    randomise(network)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    t = torch.tensor([998, 999])
    with torch.no_grad():
        expected = network(x, t, context)
    network.bfloat16()
    with torch.no_grad():
        found = network(x.bfloat16(), t, context.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 0.05
    # bf16 cannot tell 998 from 999; the embedding must.
    assert not torch.equal(
        network.time_embedding(t, torch.bfloat16)[0], network.time_embedding(t, torch.bfloat16)[1]
    )
