"""Turns a batch into what the denoiser reads: scaled latents, and the conditions that belong to them.

The trained autoencoder has no gradients here. Each rank holds the whole of it, outside every engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.data.loading.draws import Draws
from ldmscale.models.bottleneck import Posterior
from ldmscale.models.conditions import Conditions
from ldmscale.models.first_stage import FirstStageNetwork, LatentScale, digest
from ldmscale.models.tiling import decode_in_tiles, encode_in_tiles
from ldmscale.train.stage import Batch


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
        self.scale, self.device = scale.to(device), device
        self.digest = None if self.autoencoder is None else digest(self.autoencoder)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] -> what a latent shard stores: mean and log-variance [B,2C,h,w], or VQ's vectors [B,C,h,w]."""
        assert self.autoencoder is not None, "images can only be encoded by an autoencoder"
        pixels = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.tile_pixels is not None:
            return encode_in_tiles(self.autoencoder, pixels, self.tile_pixels)
        return self.autoencoder.encode(pixels).moments()

    def latents(
        self, moments: Tensor, positions: Sequence[int], seed: int, drawn: Draws | None = None
    ) -> Tensor:
        """Moments of a batch -> scaled latents [B,C,h,w]; the posterior's draw belongs to the sample's position.

        `drawn` may hold it.
        """
        # Cast where they are used: halves travel to the device in half the time.
        moments = moments.to(self.device, non_blocking=True).float()
        channels = len(self.scale.factor)
        if moments.shape[1] == channels:
            return self.scale.scale(moments)
        posterior = Posterior.from_moments(moments)
        drawn = drawn or Draws(seed, positions)
        noise = drawn.normal("posterior", posterior.mean.shape[1:]).to(self.device, non_blocking=True)
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
        drawn = Draws.of(batch, seed)
        return self.latents(moments, drawn.positions, seed, drawn)


def batch_conditions(batch: Batch, first_stage: FirstStage) -> Conditions:
    """What the readers put into a batch; nothing for a model without conditions.

    "tokens" int64 [B,L] or in their place "text" [B,L,D],
    "label" int64 [B], "embeddings" float32 [B,L,D], "spatial" (a small image float32 [B,3,h,w], or
    a map int64 [B,H,W]), or "mask" uint8 [B,1,H,W], of which `masked_latents` is made with the images.
    """
    spatial = batch.get("spatial")
    if "mask" in batch:
        spatial = masked_latents(first_stage, batch["image"], batch["mask"])
    return Conditions(
        token_ids=None if "text" in batch else batch.get("tokens"),
        labels=batch.get("label"),
        embeddings=batch.get("embeddings"),
        spatial=spatial,
        text=batch.get("text"),
    )


def masked_latents(first_stage: FirstStage, images: Tensor, masks: Tensor) -> Tensor:
    """The condition of inpainting, as released: the encoded image with a black hole, and the mask of the latent's size.

    The mean of a posterior is taken, not a draw of it. The mask is -1 where the image is known and 1 in the hole, and
    brought to size by its nearest values.

    Args:
        images: uint8 [B,3,H,W]. masks: uint8 [B,1,H,W], 1 in the hole.

    Returns:
        float32 [B,C+1,h,w] on the first stage's device.
    """
    moments = first_stage.moments(images * (1 - masks))
    latents = first_stage.scale.scale(moments[:, : len(first_stage.scale.factor)])  # [B,C,h,w]
    holes = F.interpolate(
        masks.to(latents.device, non_blocking=True).float(), size=latents.shape[-2:]
    )  # [B,1,h,w]
    return torch.cat([latents, 2 * holes - 1], dim=1)
