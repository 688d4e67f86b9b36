"""Builds networks from the configuration: plain functions, one per part, on the current default device (meta, too).

Pretrained text encoders (CLIP, T5) are opened through the transformers library, outside every engine and `zero.Init`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

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
from ldmscale.config.checks.pretrained_text import parts_elsewhere
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.errors import ConfigError
from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.conditions import ClassEmbedder, Conditions, GivenContext, SpatialRescaler
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.models.first_stage import FirstStageNetwork, PixelAutoencoder
from ldmscale.models.layers import ResnetBlock
from ldmscale.models.text_encoder import FrozenTextEncoder, TextLayer, TextTransformer
from ldmscale.models.transformer import SpatialAttention, SpatialTransformer
from ldmscale.models.unet import UNet
from ldmscale.storage.hub import cached_first

log = logging.getLogger(__name__)

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def open_text_encoder(config: FrozenTextConfig) -> FrozenTextEncoder:
    """The encoder with its weights, on the CPU, in the number format of `config`.

    Raises ConfigError where it is not to be had, lacks weights, or has other sizes than `config` says.
    """
    from transformers.utils import logging as chatter

    if faults := parts_elsewhere(Path(config.path)):
        raise ConfigError(faults)
    # It reports the weights of CLIP's other half; what is missing is refused below.
    chatter.set_verbosity_error()  # type: ignore[no-untyped-call]
    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
    network, report = _from_pretrained(_network_class(config.kind), config)
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ConfigError(
            f"text_encoder.path={config.path} lacks {len(missing)} weights of a {config.kind} text encoder, {missing[0]} "
            f"among them: is text_encoder.kind={config.kind} right?"
        )
    return _wrapped(network, config)


def bare_text_encoder(config: FrozenTextConfig) -> FrozenTextEncoder:
    """The encoder without its weights, on the current default device: for counting and for `build`.

    Raises ConfigError where its config.json is not to be had.
    """
    kind = _network_class(config.kind)
    try:
        settings = kind.config_class.from_pretrained(config.path, trust_remote_code=False)
    except Exception as error:  # no network, no such name, no access: the hub's client raises many kinds
        raise _unavailable(config, error) from error
    return _wrapped(kind(settings).to(_TYPES[config.dtype]), config)


def _network_class(kind: str) -> Any:
    # transformers takes seconds to import, and runs with another condition do not need it.
    from transformers import CLIPTextModel, T5EncoderModel

    return {"clip": CLIPTextModel, "t5": T5EncoderModel}[kind]


def _from_pretrained(kind: Any, config: FrozenTextConfig) -> tuple[nn.Module, dict[str, Any]]:
    # Neither code of the folder nor a pickle that calls functions.
    wanted = {"dtype": _TYPES[config.dtype], "output_loading_info": True, "weights_only": True}
    try:
        network, report = cached_first(
            lambda local: kind.from_pretrained(
                config.path, trust_remote_code=False, local_files_only=local, **wanted
            )
        )
    except Exception as error:
        raise _unavailable(config, error) from error
    return network, report


def _unavailable(config: FrozenTextConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"text_encoder.path={config.path} cannot be opened as a {config.kind} text encoder ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no reason given'}): give a hub name, or the folder of "
        "model and tokenizer"
    )


def _wrapped(network: nn.Module, config: FrozenTextConfig) -> FrozenTextEncoder:
    width = int(network.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if width != config.width:
        raise ConfigError(
            f"text_encoder.width={config.width}, but {config.path} has {width}: give text_encoder.width={width}"
        )
    return FrozenTextEncoder(network, max_tokens=config.max_tokens, width=config.width)
