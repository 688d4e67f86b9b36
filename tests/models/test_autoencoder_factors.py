"""Both kinds of autoencoder at every factor 2^m and any latent width, behind the same bottleneck surface."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("m", range(6))
def test_every_factor_and_width_encodes_and_decodes(kind: str, m: int) -> None:
    torch.manual_seed(0)
    width = 2 * m + 1
    common = {
        "latent_channels": width, "channels": 8, "channel_mult": (1,) * (m + 1), "blocks_per_level": 1, "norm_groups": 4,
    }  # fmt: skip
    make = KLAutoencoder if kind == "kl" else partial(VQAutoencoder, codebook_size=16, codebook_dim=2)
    network = make(**common)  # type: ignore[operator]
    images = torch.randn(2, 3, 32, 32)
    reconstruction, bottleneck = network(images, None)
    channels = width if kind == "kl" else 2
    side = 32 // 2**m
    assert network.downsampling == 2**m and network.latent_channels == channels
    mean, logvar = bottleneck.spread()
    assert mean.shape == (2, channels, side, side) and (logvar is None) == (kind == "vq")
    assert bottleneck.moments().shape[1] == (2 * channels if kind == "kl" else channels)
    assert reconstruction.shape == images.shape
    torch.testing.assert_close(network.decode(mean), reconstruction)
    (reconstruction.square().mean() + bottleneck.regulariser()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
