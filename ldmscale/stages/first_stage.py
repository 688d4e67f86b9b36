"""The trained autoencoder as the diffusion stage needs it: frozen, whole on each rank, outside every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldmscale.models.bottleneck import Posterior
from ldmscale.models.latent_scale import LatentScale, digest
from ldmscale.models.pixels import FirstStageNetwork
from ldmscale.models.tiling import decode_in_tiles, encode_in_tiles
from ldmscale.stages import noise as draws


class FirstStage:
    """Encodes images and stored moments to scaled latents, and decodes them. Works in float32.

    `tile_pixels` bounds its memory (models/tiling.py); None: images are encoded and decoded whole.
    """

    def __init__(
        self,
        autoencoder: FirstStageNetwork | None,
        scale: LatentScale,
        device: torch.device,
        tile_pixels: int | None = None,
    ) -> None:
        self.tile_pixels = tile_pixels
        self.autoencoder = (
            None if autoencoder is None else autoencoder.requires_grad_(False).eval().to(device)
        )
        self.scale, self.device = scale, device
        self.digest = None if self.autoencoder is None else digest(self.autoencoder)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] -> what a latent shard stores: mean and log-variance [B,2C,h,w], or VQ's vectors [B,C,h,w]."""
        assert self.autoencoder is not None, "images can only be encoded by an autoencoder"
        pixels = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.tile_pixels is not None:
            return encode_in_tiles(self.autoencoder, pixels, self.tile_pixels)
        return self.autoencoder.encode(pixels).moments()

    def latents(self, moments: Tensor, positions: Sequence[int], seed: int) -> Tensor:
        """Moments of a batch -> scaled latents [B,C,h,w]; the posterior's draw belongs to the sample's position."""
        # Cast where they are used: halves travel to the device in half the time.
        moments = moments.to(self.device, non_blocking=True).float()
        channels = len(self.scale.factor)
        if moments.shape[1] == channels:
            return self.scale.scale(moments)
        posterior = Posterior.from_moments(moments)
        noise = draws.normal(seed, positions, "posterior", posterior.mean.shape[1:]).to(self.device)
        return self.scale.scale(posterior.sample(noise))

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Scaled latents [B,C,h,w] -> images float32 [B,3,H,W] about [-1,1]."""
        assert self.autoencoder is not None, "latents can only be decoded by an autoencoder"
        if self.tile_pixels is not None:
            return decode_in_tiles(self.autoencoder, self.scale.unscale(latents), self.tile_pixels)
        return self.autoencoder.decode(self.scale.unscale(latents))

    def batch_latents(self, batch: Mapping[str, Any], seed: int) -> Tensor:
        """Scaled latents of a batch from either kind of shard."""
        moments = batch["latent"] if "latent" in batch else self.moments(batch["image"])
        return self.latents(moments, batch["position"].tolist(), seed)
