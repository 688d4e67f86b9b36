"""The variants that diffusers has not (LSUN-Churches, big inpainting) equal a plain second implementation."""

from __future__ import annotations

import pytest
import torch
from parity import LIMITS, draw, randomise
from reference_unet import unet
from torch import Tensor

from ldmscale.models.unet import UNet

STEPS = torch.tensor([3, 981])
# scale_shift, channels joined to the latent, attention levels: as the two models have them, in small
VARIANTS = {
    "churches": (True, 0, (0, 1)),
    "inpainting_big": (False, 4, (1, 2)),
}


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_resampling_with_a_fixed_number_of_heads(variant: str, dtype: torch.dtype) -> None:
    scale_shift, joined, attention_levels = VARIANTS[variant]
    network = UNet(
        in_channels=4 + joined,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2, 3),
        blocks_per_level=2,
        attention_levels=attention_levels,
        heads=8,
        residual_updown=True,
        scale_shift_norm=scale_shift,
    ).to(dtype)
    randomise(network)
    weights = {name: p.detach().clone().requires_grad_(True) for name, p in network.named_parameters()}
    concat = draw(2, joined, 16, 16, seed=3).to(dtype) if joined else None
    upstream = draw(2, 4, 16, 16, seed=4).to(dtype)
    ours, reference = (draw(2, 4, 16, 16).to(dtype).requires_grad_(True) for _ in range(2))

    found = network(ours, STEPS, concat=concat)
    whole = reference if concat is None else torch.cat([reference, concat], 1)
    expected = unet(
        weights,
        whole,
        STEPS,
        channels=32,
        levels=3,
        blocks=2,
        attention_levels=attention_levels,
        heads=8,
        scale_shift=scale_shift,
    )
    found.backward(upstream)
    expected.backward(upstream)

    assert ours.grad is not None and reference.grad is not None
    assert distance(found, expected) <= LIMITS[dtype]
    assert distance(ours.grad, reference.grad) <= LIMITS[dtype]
    expected_norms = {
        name: float(weight.grad.norm()) for name, weight in weights.items() if weight.grad is not None
    }
    largest = max(expected_norms.values())
    for name, p in network.named_parameters():
        assert p.grad is not None
        assert float((p.grad - weights[name].grad).norm()) <= LIMITS[dtype] * largest, name  # type: ignore[operator]


def test_the_number_of_heads_matters() -> None:
    """What the comparison above would see if the heads were of a fixed size instead."""
    outputs = []
    for heads in ({"heads": 8}, {"head_channels": 8}):
        network = UNet(
            in_channels=4, out_channels=4, channels=32, channel_mult=(1, 2), blocks_per_level=1,
            attention_levels=(0,), **heads,
        )  # fmt: skip
        randomise(network)
        outputs.append(network(draw(2, 4, 8, 8).float(), STEPS))
    assert distance(*outputs) > 1e-3
