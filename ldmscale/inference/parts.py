"""The networks and settings of a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.boxes import LayoutTokens
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.models.conditions import ClassEmbedder, SpatialRescaler
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.first_stage import FirstStageNetwork, LatentScale
from ldmscale.models.text_encoder import FrozenTextEncoder, TextTransformer
from ldmscale.models.unet import UNet


@dataclass
class Parts:
    """A model taken apart. What a model does not have is None."""

    unet: UNet | None = None
    autoencoder: FirstStageNetwork | None = None
    text_encoder: TextTransformer | FrozenTextEncoder | None = None
    tokenizer: Tokenizer | EncoderTokenizer | None = None
    schedule: NoiseSchedule | None = None
    class_embedder: ClassEmbedder | None = None
    classes: ClassLabels | None = None  # what the class embedder's rows are called
    layout: LayoutTokens | None = None  # boxes to token ids, for a text encoder that reads layouts
    spatial_rescaler: SpatialRescaler | None = None
    denoiser: Denoiser | None = (
        None  # U-Net, what reads its conditions, and the null condition, as one network
    )
    scale: LatentScale | None = None  # between the autoencoder's latents and those that the U-Net sees
    latent_shape: tuple[int, int, int] | None = None  # [C,h,w] that the model was trained at
    # Of each aspect-ratio bucket that it was trained with, `latent_shape` first; empty: without buckets
    latent_shapes: tuple[tuple[int, int, int], ...] = ()
    prediction: str = "eps"
    spatial: str | None = None  # what is joined to the latent: "map", "image" or "masked"
    spatial_dropout: float | None = None  # how often the model was trained without it; None: not known
    caption_dropout: float | None = None  # and how often with the null condition in place of its context
    latent_statistics: dict[str, Any] | None = None  # measured at the end of the autoencoder's training
    autoencoder_average: str | None = None  # which average the autoencoder's weights are; None: the raw ones
