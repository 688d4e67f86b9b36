"""Every family in bf16 follows fp32 within a bound, and recomputed activations change no bit of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import draw, randomise
from torch import Tensor, nn

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.layers import Checkpointing
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

STEPS = torch.tensor([3, 981])
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(4))
SIZES: dict[str, Any] = {"out_channels": 4, "channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1}
BF16_OUTPUT = 0.04  # of the largest value
BF16_GRADIENT = 0.1  # of the norm of all gradients together

Call = Callable[[nn.Module, torch.dtype], Tensor]


def latent(dtype: torch.dtype, channels: int = 4) -> Tensor:
    return draw(2, channels, 16, 16).to(dtype)


def images(dtype: torch.dtype) -> Tensor:
    return draw(2, 3, 32, 32).to(dtype)


FAMILIES: dict[str, tuple[Callable[[Checkpointing], nn.Module], Call]] = {
    "text to image": (
        lambda c: UNet(**SIZES, in_channels=4, attention_levels=(0, 1), heads=2, context_dim=24, checkpointing=c),
        lambda network, dtype: network(latent(dtype), STEPS, draw(2, 5, 24, seed=2).to(dtype)),
    ),
    "layout": (
        lambda c: UNet(
            **SIZES, in_channels=4, attention_levels=(1,), head_channels=16, context_dim=24, transformer_depth=3,
            checkpointing=c,
        ),
        lambda network, dtype: network(latent(dtype), STEPS, draw(2, 5, 24, seed=2).to(dtype)),
    ),
    "unconditional": (
        lambda c: UNet(**SIZES, in_channels=4, attention_levels=(1,), head_channels=16, checkpointing=c),
        lambda network, dtype: network(latent(dtype), STEPS),
    ),
    "residual resampling": (
        lambda c: UNet(
            **SIZES, in_channels=8, attention_levels=(1,), heads=8, residual_updown=True, scale_shift_norm=True,
            checkpointing=c,
        ),
        lambda network, dtype: network(latent(dtype), STEPS, concat=draw(2, 4, 16, 16, seed=3).to(dtype)),
    ),
    "text transformer": (
        lambda c: TextTransformer(
            vocab_size=50, max_tokens=12, width=48, layers=3, heads=4, head_channels=16, checkpointing=c
        ),
        lambda network, dtype: network(IDS),
    ),
    "kl autoencoder": (
        lambda c: KLAutoencoder(
            latent_channels=4, channels=32, channel_mult=(1, 2), blocks_per_level=1, attention_levels=(1,),
            checkpointing=c,
        ),
        lambda network, dtype: network(images(dtype), draw(2, 4, 16, 16, seed=5).to(dtype))[0],
    ),
    "vq autoencoder": (
        lambda c: VQAutoencoder(
            latent_channels=3, channels=32, channel_mult=(1, 2), blocks_per_level=1, codebook_size=16,
            checkpointing=c,
        ),
        # Codes jump: what is compared lies before them.
        lambda network, dtype: network.encode(images(dtype)).latent,  # type: ignore[operator]
    ),
}  # fmt: skip


def run(family: str, checkpointing: Checkpointing, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    build, call = FAMILIES[family]
    network = build(checkpointing)
    randomise(network)
    out = call(network.to(dtype), dtype)
    out.float().square().mean().backward()
    return out.detach().float(), {
        n: p.grad.float() for n, p in network.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_follows_fp32_within_its_bound(family: str) -> None:
    expected, gradients = run(family, "off", torch.float32)
    found, rounded = run(family, "off", torch.bfloat16)
    assert 1e-4 < float((found - expected).abs().max() / expected.abs().max()) < BF16_OUTPUT
    assert rounded.keys() == gradients.keys()
    error = torch.stack([(rounded[name] - g).norm() for name, g in gradients.items()]).norm()
    assert float(error / torch.stack([g.norm() for g in gradients.values()]).norm()) < BF16_GRADIENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit_of_a_gradient(family: str, dtype: torch.dtype) -> None:
    (off, gradients), (full, recomputed) = run(family, "off", dtype), run(family, "full", dtype)
    assert torch.equal(off, full)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(g, recomputed[name]) for name, g in gradients.items())
