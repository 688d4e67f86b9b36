"""A model of another format as networks that run: what `ldmscale.load` gives for an imported or exported model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldmscale.builders.networks import build_autoencoder, build_schedule, build_text_encoder, build_unet
from ldmscale.config import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    SpatialConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.errors import DataError
from ldmscale.inference.parts import Parts
from ldmscale.interop.model import Model, Part
from ldmscale.interop.reading import one_average, read
from ldmscale.models.conditions import ClassEmbedder, SpatialRescaler
from ldmscale.models.denoiser import Denoiser

_N = TypeVar("_N", bound=nn.Module)


def load_model(path: Path, ema: bool | str, dtype: torch.dtype) -> Parts:
    """The parts of an imported model's folder, a diffusers folder or a CompVis checkpoint; see `ldmscale.load`."""
    return parts_of(read(path), one_average(ema), dtype)


def parts_of(model: Model, ema: bool, dtype: torch.dtype) -> Parts:
    """Networks with the model's weights, on the CPU; the autoencoder beside a U-Net stays in float32.

    Raises DataError where a setting is not known without which they cannot run.
    """
    if model.unknown:
        raise DataError([*model.unknown.values()])
    parts = Parts(scale=model.scale)
    for name, part in model.parts.items():
        config = part.config
        wide = torch.float32 if name == "autoencoder" and "unet" in model.parts else dtype
        if isinstance(config, UNetConfig):
            parts.unet = _filled(build_unet(config), part, ema, wide)
        elif isinstance(config, AutoencoderConfig):
            parts.autoencoder = _filled(build_autoencoder(config), part, ema, wide)
            parts.autoencoder_average = "ema" if ema and part.averaged is not None else None
        elif isinstance(config, TextEncoderConfig):
            parts.text_encoder = _filled(build_text_encoder(config), part, ema, wide)
        elif isinstance(config, ClassEmbedderConfig):
            embedder = ClassEmbedder(classes=config.classes, width=config.width, null_class=config.null_class)
            parts.class_embedder = _filled(embedder, part, ema, wide)
            parts.classes = ClassLabels("cls", config.classes, model.class_names)
        elif isinstance(config, SpatialConfig):
            assert config.map_classes is not None
            rescaler = SpatialRescaler(
                in_channels=config.map_classes, out_channels=config.channels, halvings=config.halvings
            )
            parts.spatial_rescaler = _filled(rescaler, part, ema, wide)
    if model.diffusion is not None:
        parts.schedule = build_schedule(model.diffusion)
        parts.prediction = model.diffusion.prediction
    if parts.unet is not None and model.latent_size is not None:
        parts.latent_shape = (parts.unet.out_channels, model.latent_size, model.latent_size)
    if model.tokenizer is not None and model.text_encoder is not None:
        parts.tokenizer = Tokenizer.load(model.tokenizer, model.text_encoder.max_tokens)
    parts.spatial = _spatial(parts)
    parts.denoiser = _denoiser(parts)
    return parts


def _spatial(parts: Parts) -> str | None:
    """What the published models join to the latent, told by the number of its channels."""
    joined = 0 if parts.unet is None else parts.unet.in_channels - parts.unet.out_channels
    if parts.unet is None or not joined:
        return None
    if parts.spatial_rescaler is not None:
        return "map"
    return {parts.unet.out_channels + 1: "masked", 3: "image"}.get(joined)


def _denoiser(parts: Parts) -> Denoiser | None:
    """The parts as one network; None where what gives its context, or the null condition, is not there."""
    if parts.unet is None:
        return None
    null: Tensor | None = None
    if parts.text_encoder is not None:
        if parts.tokenizer is None:
            return None
        null = torch.from_numpy(parts.tokenizer.encode([""]))[0]
    elif parts.unet.context_dim is not None and parts.class_embedder is None:
        return None
    if parts.unet.class_embedding is not None:
        return None  # its labels enter by the time vector, which no stage of ours gives
    return Denoiser(
        parts.unet,
        parts.text_encoder,
        null,
        class_embedder=parts.class_embedder,
        spatial_rescaler=parts.spatial_rescaler,
    ).eval()


def _filled(network: _N, part: Part, ema: bool, dtype: torch.dtype) -> _N:
    weights: Mapping[str, Tensor] = part.averaged if ema and part.averaged is not None else part.weights
    # Copies: the tensors are mapped from a file, and a network's weights may be trained on.
    network.to(dtype).load_state_dict(weights, strict=True)
    return network.requires_grad_(False).eval()
