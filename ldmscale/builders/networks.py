"""From configuration to networks: plain functions, one a part. They build on the current default device (meta, too)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from ldmscale.builders.text_encoders import bare_text_encoder
from ldmscale.config import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    DiffusionConfig,
    DiffusionJob,
    FrozenTextConfig,
    SpatialConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldmscale.diffusion.schedule import NoiseSchedule
from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.conditions import ClassEmbedder, Conditions, GivenContext, SpatialRescaler
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.models.frozen_text import FrozenTextEncoder
from ldmscale.models.layers import ResnetBlock
from ldmscale.models.pixels import FirstStageNetwork, PixelAutoencoder
from ldmscale.models.text_encoder import TextLayer, TextTransformer
from ldmscale.models.transformer import SpatialAttention, SpatialTransformer
from ldmscale.models.unet import UNet

log = logging.getLogger(__name__)

# What runs as a whole: checkpointing recomputes these, and ZeRO-3 may gather them in one piece.
BLOCKS = (ResnetBlock, SpatialTransformer, SpatialAttention, TextLayer)


def _arguments(config: object, *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(cast(Any, config)).items() if key not in left_out}


def build_autoencoder(config: AutoencoderConfig) -> KLAutoencoder | VQAutoencoder:
    """The autoencoder that `config` describes, with fresh weights."""
    if config.kind == "pixels":
        raise ValueError("autoencoder.kind=pixels has no weights: there is nothing to train or to fill")
    if config.kind == "vq":
        return VQAutoencoder(**_arguments(config, "kind"))
    return KLAutoencoder(**_arguments(config, "kind", "codebook_size", "codebook_dim", "commitment"))


def build_first_stage(config: AutoencoderConfig) -> FirstStageNetwork:
    """What a diffusion model works behind: an autoencoder with fresh weights, or none."""
    if config.kind == "pixels":
        return PixelAutoencoder(image_channels=config.image_channels)
    return build_autoencoder(config)


def build_unet(config: UNetConfig) -> UNet:
    """The U-Net that `config` describes, with fresh weights."""
    return UNet(**_arguments(config))


def build_text_encoder(config: TextEncoderConfig) -> TextTransformer:
    """The text transformer that `config` describes, with fresh weights."""
    return TextTransformer(**_arguments(config, "kind", "tokenizer"))


def build_denoiser(
    config: DiffusionJob,
    null_token_ids: Tensor | None = None,
    frozen_text: FrozenTextEncoder | None = None,
) -> Denoiser:
    """The U-Net and what reads its conditions, as the one network that the diffusion stage trains.

    Args:
        config: its sections unet, text_encoder, class_embedder, embeddings, spatial and diffusion.
        null_token_ids: int64 [L], the empty caption or layout; zeros unless given (the weights bring their own).
        frozen_text: the opened encoder of a model that reads with one; without its weights unless given.
    """
    text, classes, given, spatial = (
        config.text_encoder,
        config.class_embedder,
        config.embeddings,
        config.spatial,
    )
    if text is not None and null_token_ids is None:
        null_token_ids = torch.zeros(text.max_tokens, dtype=torch.int64)
    reader: TextTransformer | FrozenTextEncoder | None = frozen_text
    if isinstance(text, FrozenTextConfig) and frozen_text is None:
        reader = bare_text_encoder(text)
    elif isinstance(text, TextEncoderConfig):
        reader = build_text_encoder(text)
    return Denoiser(
        build_unet(config.unet),
        reader,
        null_token_ids,
        null_condition=config.diffusion.null_condition,
        class_embedder=None if classes is None else ClassEmbedder(**_arguments(classes, "names")),
        embeddings=None if given is None else GivenContext(**_arguments(given, "member")),
        spatial_rescaler=None if spatial is None else _build_rescaler(spatial),
    )


def _build_rescaler(config: SpatialConfig) -> SpatialRescaler | None:
    if config.map_classes is None:
        return None
    return SpatialRescaler(
        in_channels=config.map_classes, out_channels=config.channels, halvings=config.halvings
    )


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The noise schedule that `config` describes."""
    return NoiseSchedule.make(
        config.schedule, config.timesteps, config.beta_start, config.beta_end, config.zero_terminal_snr
    )


def build_discriminator(config: AutoencoderLossConfig) -> PatchDiscriminator:
    """The patch discriminator that `config` describes, with fresh weights."""
    return PatchDiscriminator(
        channels=config.discriminator_channels,
        layers=config.discriminator_layers,
        norm=config.discriminator_norm,
    )


def blank_conditions(config: DiffusionJob, latent_shape: Sequence[int], batch: int = 1) -> Conditions:
    """Conditions of zeros, of the shapes that the model of `config` reads, on the current default device."""
    height, width = latent_shape[1:]
    text, given, spatial = config.text_encoder, config.embeddings, config.spatial
    joined = None
    if spatial is not None and spatial.kind == "map":
        size = 2**spatial.halvings
        joined = torch.zeros(batch, height * size, width * size, dtype=torch.int64)
    elif spatial is not None:
        joined = torch.zeros(batch, spatial.channels, height, width)
    return Conditions(
        token_ids=None if text is None else torch.zeros(batch, text.max_tokens, dtype=torch.int64),
        labels=None if config.class_embedder is None else torch.zeros(batch, dtype=torch.int64),
        embeddings=None if given is None else torch.zeros(batch, given.max_tokens, given.width),
        spatial=joined,
    )
