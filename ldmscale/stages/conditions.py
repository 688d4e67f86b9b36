"""From a batch to what the denoiser is told: each reader of the data fills one part of `Conditions`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.models.conditions import Conditions
from ldmscale.stages.first_stage import FirstStage
from ldmscale.train.stage import Batch


def batch_conditions(batch: Batch, first_stage: FirstStage) -> Conditions:
    """What the readers put into a batch; nothing for a model without conditions.

    "tokens" int64 [B,L], "label" int64 [B], "embeddings" float32 [B,L,D], "spatial" (a small image float32 [B,3,h,w], or
    a map int64 [B,H,W]), or "mask" uint8 [B,1,H,W], of which `masked_latents` is made with the images.
    """
    spatial = batch.get("spatial")
    if "mask" in batch:
        spatial = masked_latents(first_stage, batch["image"], batch["mask"])
    return Conditions(
        token_ids=batch.get("tokens"),
        labels=batch.get("label"),
        embeddings=batch.get("embeddings"),
        spatial=spatial,
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
    holes = F.interpolate(masks.to(latents.device, torch.float32), size=latents.shape[-2:])  # [B,1,h,w]
    return torch.cat([latents, 2 * holes - 1], dim=1)
