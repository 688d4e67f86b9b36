"""Our autoencoders equal diffusers' on the same random weights, forward and backward."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from parity import assert_parity, draw, randomise
from torch import Tensor

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder

TYPES = [torch.float32, torch.float64]

# channel_mult, attention_levels, mid_attention of the published families
FAMILIES = {
    "f4": ((1, 2, 4), (), True),
    "f8": ((1, 2, 4, 4), (), True),
    "f16": ((1, 1, 2, 2, 4), (4,), True),
    "f32": ((1, 1, 2, 2, 4, 4), (4, 5), True),
    "vq_f8": ((1, 2, 2, 4), (3,), True),
    "f4_noattn": ((1, 2, 4), (), False),
}


def reference_blocks(mult: tuple[int, ...], attention: tuple[int, ...]) -> dict[str, tuple[str, ...]]:
    down = tuple(
        "AttnDownEncoderBlock2D" if i in attention else "DownEncoderBlock2D" for i in range(len(mult))
    )
    up = tuple(
        "AttnUpDecoderBlock2D" if i in attention else "UpDecoderBlock2D" for i in reversed(range(len(mult)))
    )
    return {"down_block_types": down, "up_block_types": up}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vq_f8"])
def test_kl_moments_and_decoder(family: str, dtype: torch.dtype) -> None:
    mult, attention, middle = FAMILIES[family]
    ours = KLAutoencoder(
        latent_channels=4,
        channels=32,
        channel_mult=mult,
        blocks_per_level=2,
        attention_levels=attention,
        mid_attention=middle,
    )
    reference = AutoencoderKL(
        **reference_blocks(mult, attention),
        block_out_channels=tuple(32 * m for m in mult),
        latent_channels=4,
        layers_per_block=2,
        mid_block_add_attention=middle,
        sample_size=32,
    )
    noise = draw(2, 4, 32 // ours.downsampling, 32 // ours.downsampling, seed=5)

    def call_ours(images: Tensor) -> tuple[Tensor, ...]:
        reconstruction, posterior = ours(images, noise.to(images.dtype))
        return reconstruction, posterior.moments(), posterior.kl()

    def call_reference(images: Tensor) -> tuple[Tensor, ...]:
        posterior = reference.encode(images).latent_dist
        reconstruction = reference.decode(posterior.mean + posterior.std * noise.to(images.dtype)).sample
        return reconstruction, torch.cat([posterior.mean, posterior.logvar], 1), posterior.kl()

    assert_parity(ours, reference, call_ours, call_reference, [draw(2, 3, 32, 32)], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["f4", "vq_f8", "f16", "f4_noattn"])
def test_vq_latent_codes_loss_and_decoder(family: str, dtype: torch.dtype) -> None:
    mult, attention, middle = FAMILIES[family]
    ours = VQAutoencoder(
        latent_channels=3,
        channels=32,
        channel_mult=mult,
        blocks_per_level=1,
        codebook_size=64,
        attention_levels=attention,
        mid_attention=middle,
    )
    reference = VQModel(
        **reference_blocks(mult, attention),
        block_out_channels=tuple(32 * m for m in mult),
        latent_channels=3,
        layers_per_block=1,
        num_vq_embeddings=64,
        mid_block_add_attention=middle,
        sample_size=32,
    )

    def call_ours(images: Tensor) -> tuple[Tensor, ...]:
        reconstruction, codes = ours(images)
        return reconstruction, codes.latent, codes.loss

    def call_reference(images: Tensor) -> tuple[Tensor, ...]:
        latent = reference.encode(images).latents
        decoded = reference.decode(latent)
        return decoded.sample, latent, decoded.commit_loss

    images = draw(2, 3, 32, 32)
    assert_parity(ours, reference, call_ours, call_reference, [images], dtype)

    codes = ours.encode(images.to(dtype))
    expected = reference.quantize(codes.latent)
    assert torch.equal(codes.indices.flatten(), expected[2][2])
    assert torch.equal(
        ours.quantize.vectors(codes.indices), ours.quantize.embedding[codes.indices].permute(0, 3, 1, 2)
    )


def test_vq_decode_quantises_what_encode_gave() -> None:
    ours = VQAutoencoder(
        latent_channels=3, channels=32, channel_mult=(1, 2), blocks_per_level=1, codebook_size=16
    )
    randomise(ours)
    images = draw(2, 3, 16, 16).float()
    codes = ours.encode(images)
    reconstruction, _ = ours(images)
    assert codes.indices.shape == (2, 8, 8)
    assert not torch.allclose(codes.latent, codes.quantized)
    torch.testing.assert_close(ours.decode(codes.latent), reconstruction)
    torch.testing.assert_close(
        ours.decode(ours.quantize.vectors(codes.indices), quantize=False), reconstruction
    )
