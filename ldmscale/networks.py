"""From configuration to networks: plain functions, one a part. They build on the current default device (meta, too)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldmscale.config import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    DiffusionConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldmscale.diffusion.schedule import NoiseSchedule
from ldmscale.models.attention import probe, set_backend
from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.denoiser import TextConditionedDenoiser
from ldmscale.models.discriminator import PatchDiscriminator
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

log = logging.getLogger(__name__)


def _arguments(config: object, *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(cast(Any, config)).items() if key not in left_out}


def build_autoencoder(config: AutoencoderConfig) -> KLAutoencoder | VQAutoencoder:
    """The first stage that `config` describes, with fresh weights."""
    if config.kind == "vq":
        return VQAutoencoder(**_arguments(config, "kind"))
    return KLAutoencoder(**_arguments(config, "kind", "codebook_size", "codebook_dim", "commitment"))


def build_unet(config: UNetConfig) -> UNet:
    """The U-Net that `config` describes, with fresh weights."""
    return UNet(**_arguments(config))


def build_text_encoder(config: TextEncoderConfig) -> TextTransformer:
    """The text transformer that `config` describes, with fresh weights."""
    return TextTransformer(**_arguments(config, "kind", "tokenizer"))


def build_denoiser(
    unet: UNetConfig,
    text_encoder: TextEncoderConfig,
    null_condition: Literal["tokens", "learned"],
    null_token_ids: Tensor,
) -> TextConditionedDenoiser:
    """U-Net and text transformer as the one network that the diffusion stage trains; null_token_ids int64 [L]."""
    return TextConditionedDenoiser(
        build_unet(unet), build_text_encoder(text_encoder), null_token_ids, null_condition=null_condition
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


def choose_attention(
    wanted: str, head_channels: Sequence[int], device: torch.device, dtype: torch.dtype
) -> str:
    """Settle the attention backend for this process and return its name.

    "auto" takes xformers on CUDA and SDPA elsewhere. xformers must agree with SDPA, forward and backward, at the
    model's head sizes (pain 36); where it does not, that is said and SDPA is taken.
    """
    backend = wanted if wanted != "auto" else ("xformers" if device.type == "cuda" else "sdpa")
    if backend == "xformers" and (fault := _xformers_fault(head_channels, device, dtype)):
        log.warning("xformers %s: attention uses PyTorch's SDPA", fault)
        backend = "sdpa"
    set_backend(cast(Any, backend))
    return backend


def training_flops(unet: UNetConfig, text_encoder: TextEncoderConfig, latent_shape: Sequence[int]) -> int:
    """Floating-point operations of forward and backward of one image with its caption, counted on the meta device.

    Matrix products, convolutions and attention count, as in MFU (Chowdhery et al. 2022); recomputation does not.
    """
    with torch.device("meta"):
        tokens = torch.zeros(1, text_encoder.max_tokens, dtype=torch.int64)
        network = build_denoiser(
            replace(unet, checkpointing="off"),
            replace(text_encoder, checkpointing="off"),
            "tokens",
            tokens[0],
        )
        x, t = torch.empty(1, *latent_shape), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        network(x, t, tokens).sum().backward()
    return int(counter.get_total_flops())


def _xformers_fault(head_channels: Sequence[int], device: torch.device, dtype: torch.dtype) -> str | None:
    bound = 4 * torch.finfo(dtype).eps
    for size in sorted(set(head_channels)):
        try:
            result = probe("xformers", size, device, dtype)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            return f"fails at head size {size} ({str(error).splitlines()[0]})"
        if max(result.forward, result.backward) > bound:
            return f"differs from SDPA at head size {size} by {result.forward:.1e} and {result.backward:.1e} of its largest value"
    return None


def unet_head_channels(config: UNetConfig) -> list[int]:
    """Head sizes of the attention layers of a U-Net."""
    widths = [config.channels * config.channel_mult[level] for level in config.attention_levels]
    widths.append(config.channels * config.channel_mult[-1])  # the middle block
    return [config.head_channels or width // (config.heads or 1) for width in widths]
