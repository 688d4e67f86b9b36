"""What is measured of a finished model, and by which networks."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT, Positive


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """One evaluation. Every choice is written into its result."""

    model: str  # a run folder, one of its checkpoints, or an imported model
    kind: Literal["reconstruction"] = "reconstruction"  # of the images in data.shards by the autoencoder
    ema: bool = True  # averaged weights where the model has them
    samples: Positive | None = None  # the first so many of the shards; null: all
    out: str | None = None  # the result, JSON; <model>/evaluation/<kind>.json unless given
    rank_batch: Positive = 16
    precision: Literal["bf16", "fp32"] = "fp32"
    # the perceptual distance; its weights as in loss.perceptual_weights
    perceptual: Literal["lpips_vgg16", "efficientnet_lite0", "none"] = "none"
    perceptual_weights: str | None = None
    perceptual_weights_sha256: str | None = None
    perceptual_heads: str | None = None
    perceptual_min_side: int = 64
    # whose features the Frechet distance is of, and is named after
    features: Literal["efficientnet_lite0", "inception_fid", "none"] = "none"
    features_weights: str | None = None  # null: the installed package's; inception_fid: its file
    features_weights_sha256: str | None = None  # null: of the published file
