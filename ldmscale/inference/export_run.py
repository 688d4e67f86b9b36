"""A run of ours as a model to export: its newest complete checkpoint, or a given one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import nn

from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import (
    AutoencoderJob,
    DiffusionJob,
    FrozenTextConfig,
    ImportedUNetConfig,
    TextEncoderConfig,
)
from ldmscale.config.typed import read
from ldmscale.errors import ConfigError
from ldmscale.inference.load import load
from ldmscale.inference.parts import Parts
from ldmscale.interop.model import Model, Part, PartConfig
from ldmscale.models.first_stage import LatentScale


def read_run(path: Path, ema: bool | str) -> Model:
    """The model of a run folder, or of a checkpoint in it.

    Args:
        ema: as in `ldmscale.load`: averaged weights of all networks, where the run kept them; False: the weights as trained.

    Raises:
        ConfigError: no run, or an export is not possible. CheckpointError: no complete checkpoint.
    """
    checkpoint = path.name.startswith("step_") and (path / "manifest.json").is_file()
    folder = RunFolder(path.parent.parent if checkpoint else path)
    values = folder.config()
    parts = load(path, ema=ema)
    if values["job"] == "autoencoder":
        return _autoencoder(read(AutoencoderJob, values), parts)
    return _diffusion(read(DiffusionJob, values), folder, parts)


def _autoencoder(config: AutoencoderJob, parts: Parts) -> Model:
    assert parts.autoencoder is not None
    scale = None
    if parts.latent_statistics is not None:
        scale = LatentScale.of(parts.latent_statistics, "factor")
    size = config.data.image_size
    return Model(
        parts={"autoencoder": _part(config.autoencoder, parts.autoencoder)},
        scale=scale,
        latent_size=None if size is None else size // config.autoencoder.factor,
    )


def _diffusion(config: DiffusionJob, folder: RunFolder, parts: Parts) -> Model:
    assert parts.unet is not None and parts.latent_shape is not None
    if parts.latent_shape[1] != parts.latent_shape[2]:
        raise ConfigError(
            f"{folder.path} was trained at latents of {parts.latent_shape}: other formats know square ones only"
        )
    if isinstance(config.text_encoder, FrozenTextConfig):
        raise ConfigError(
            f"{folder.path} reads captions with a frozen {config.text_encoder.kind} encoder: such a model can be loaded and "
            "drawn from here, but not exported yet"
        )
    if config.layout is not None:
        raise ConfigError(
            f"{folder.path} reads layouts: such a model can be loaded and drawn from here, but not exported yet, because other "
            "formats would give its text encoder captions"
        )
    if config.autoencoder.kind == "pixels":
        raise ConfigError(
            f"{folder.path} works on pixels, without an autoencoder: other formats cannot say so; it can be loaded and drawn "
            "from here"
        )
    model = Model(
        parts={"unet": _part(ImportedUNetConfig(**asdict(config.unet)), parts.unet)},
        diffusion=config.diffusion,
        scale=parts.scale,
        latent_size=parts.latent_shape[1],
        tokenizer=folder.tokenizer if parts.tokenizer is not None else None,
        learned_null=config.diffusion.null_condition == "learned" and parts.denoiser is not None
        and parts.denoiser.null_context is not None,
    )  # fmt: skip
    if parts.autoencoder is not None:
        model.parts["autoencoder"] = _part(config.autoencoder, parts.autoencoder)
    if isinstance(config.text_encoder, TextEncoderConfig) and parts.text_encoder is not None:
        model.parts["text_encoder"] = _part(config.text_encoder, parts.text_encoder)
    if config.class_embedder is not None and parts.class_embedder is not None:
        model.parts["class_embedder"] = _part(config.class_embedder, parts.class_embedder)
        model.class_names = None if parts.classes is None else parts.classes.names
    if config.spatial is not None and parts.spatial_rescaler is not None:
        model.parts["spatial_rescaler"] = _part(config.spatial, parts.spatial_rescaler)
    return model


def _part(config: PartConfig, network: nn.Module) -> Part:
    return Part(config, dict(network.state_dict()))
