"""A model between formats: its parts with their weights under our names, and the folder that `ldmscale import` makes.

model.json                   configurations of the parts, schedule, latent scale, where it comes from, what was kept
unet.safetensors             weights under our names, in the dtypes of the source
unet_averaged.safetensors    averaged copies, where the source has them; alike autoencoder and text_encoder
kept.safetensors             tensors that are no part of a network here, under the names they had
lightning.json, lightning.safetensors   what a .ckpt held besides its state_dict
tokenizer/                   as it was
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldmscale.config import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    DiffusionConfig,
    ImportedUNetConfig,
    SpatialConfig,
    TextEncoderConfig,
)
from ldmscale.config.typed import read as read_values
from ldmscale.errors import DataError
from ldmscale.interop.compvis_names import TEXT_HEAD
from ldmscale.interop.lightning import read_lightning, write_lightning
from ldmscale.interop.tensors import read_json, read_safetensors, write_json, write_safetensors
from ldmscale.models.first_stage import LatentScale
from ldmscale.storage.names import FOLDER, SAFETENSORS, accepted, shown

MODEL_FILE = "model.json"
FORMAT = "ldmscale imported model"
VERSION = 1
SCHEDULE_KEYS = ("timesteps", "schedule", "beta_start", "beta_end", "prediction", "zero_terminal_snr")
PartConfig = ImportedUNetConfig | AutoencoderConfig | TextEncoderConfig | ClassEmbedderConfig | SpatialConfig
KINDS: dict[str, type[PartConfig]] = {
    "unet": ImportedUNetConfig,
    "autoencoder": AutoencoderConfig,
    "text_encoder": TextEncoderConfig,
    "class_embedder": ClassEmbedderConfig,
    "spatial_rescaler": SpatialConfig,
}


@dataclass
class Part:
    """One network: how it is built, and its tensors by our names."""

    config: PartConfig
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor] | None = None
    # Tensors that belong to this network in other formats and that ours does without (the head over the vocabulary).
    head: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Model:
    """A model between formats.

    Attributes:
        parts: by the names of `KINDS`; what a model does not have is not there.
        diffusion: schedule and prediction; None where the source does not say.
        scale: between the autoencoder's latents and the U-Net's; None where the source does not say.
        latent_size: height and width of the latents that the U-Net was trained at.
        tokenizer: a folder.
        class_names: what the rows of the class embedder are called; None where classes are numbers.
        kept: tensors that are no part of a network here, under the names of CompVis' checkpoints.
        lightning: what a .ckpt held besides its state_dict.
        source: how the source was laid out, for writing the same format again.
        learned_null: the null condition is a trained context, which no other format has a place for.
        unknown: settings that neither the source nor the user told, each with the sentence that asks for it. Their values in
            `parts` keep a place. Such a model can be written as it came, and not be run.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    diffusion: DiffusionConfig | None = None
    scale: LatentScale | None = None
    latent_size: int | None = None
    tokenizer: Path | None = None
    class_names: tuple[str, ...] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    lightning: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    learned_null: bool = False
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def unet(self) -> ImportedUNetConfig | None:
        return cast(ImportedUNetConfig, self.parts["unet"].config) if "unet" in self.parts else None

    @property
    def autoencoder(self) -> AutoencoderConfig | None:
        return (
            cast(AutoencoderConfig, self.parts["autoencoder"].config) if "autoencoder" in self.parts else None
        )

    @property
    def text_encoder(self) -> TextEncoderConfig | None:
        return (
            cast(TextEncoderConfig, self.parts["text_encoder"].config)
            if "text_encoder" in self.parts
            else None
        )

    def scale_by(self, factor: float) -> bool:
        """Set the one number that latents are multiplied by; False where no part tells how many channels they have."""
        if self.autoencoder is not None:
            channels = self.autoencoder.latent_width
        elif self.unet is not None:
            channels = self.unet.out_channels
        else:
            return False
        self.scale = LatentScale(torch.zeros(channels), torch.full((channels,), factor))
        return True

    @property
    def factor(self) -> float | None:
        """The one number that latents are multiplied by; None where there is no scale, or not one number."""
        if (
            self.scale is None
            or bool(self.scale.shift.any())
            or bool((self.scale.factor != self.scale.factor[0]).any())
        ):
            return None
        # The shortest number that float32 holds as this one: 0.18215, not 0.18215000629425049.
        return float(str(self.scale.factor[0].numpy()))


def write_model(model: Model, folder: Path) -> None:
    """Write an imported model's folder; `folder` exists and is empty."""
    described: dict[str, Any] = {}
    for name, part in model.parts.items():
        described[name] = _plain(asdict(part.config))
        write_safetensors(folder / f"{name}.safetensors", part.weights | part.head)
        if part.averaged is not None:
            write_safetensors(folder / f"{name}_averaged.safetensors", part.averaged)
    if model.kept:
        write_safetensors(folder / "kept.safetensors", model.kept)
    if model.lightning:
        write_lightning(model.lightning, folder)
    if model.tokenizer is not None:
        shutil.copytree(model.tokenizer, folder / "tokenizer")
    values = {
        "format": FORMAT,
        "version": VERSION,
        "parts": described,
        "diffusion": None
        if model.diffusion is None
        else {key: getattr(model.diffusion, key) for key in SCHEDULE_KEYS},
        "scale": None if model.scale is None else model.scale.plain(),
        "latent_size": model.latent_size,
        "class_names": model.class_names,
        "kept": sorted(model.kept),
        "unknown": model.unknown,
        "source": model.source,
    }
    write_json(folder / MODEL_FILE, values)


def read_model(folder: Path) -> Model:
    """An imported model's folder. Raises DataError where it is none, or is not whole."""
    values = read_json(folder / MODEL_FILE)
    try:
        return _read_model(folder, values)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{folder / MODEL_FILE} does not describe a model ({type(error).__name__}: {error}): import the source again"
        ) from error


def _read_model(folder: Path, values: Any) -> Model:
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        raise DataError(
            f"{folder / MODEL_FILE} is of {values.get('format')!r} {values.get('version')}, expected {FORMAT!r} {VERSION}: "
            "import the source again"
        )
    _check_names(values, folder / MODEL_FILE)
    model = Model(
        diffusion=None if values["diffusion"] is None else DiffusionConfig(**values["diffusion"]),
        scale=None if values["scale"] is None else LatentScale.from_plain(values["scale"]),
        latent_size=values["latent_size"],
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").is_dir() else None,
        class_names=tuple(values["class_names"]) if values.get("class_names") else None,
        source=values["source"],
        unknown=values.get("unknown", {}),
    )
    for name, config in values["parts"].items():
        tensors = read_safetensors(folder / f"{name}.safetensors")
        averaged = folder / f"{name}_averaged.safetensors"
        head = (
            {key: tensors.pop(key) for key in TEXT_HEAD if key in tensors} if name == "text_encoder" else {}
        )
        model.parts[name] = Part(
            read_values(KINDS[name], config),
            tensors,
            read_safetensors(averaged) if averaged.is_file() else None,
            head,
        )
    if values["kept"]:
        model.kept = read_safetensors(folder / "kept.safetensors")
    if (folder / "lightning.json").is_file():
        model.lightning = read_lightning(folder)
    return model


def _check_names(values: Mapping[str, Any], file: Path) -> None:
    """Raises DataError where the file names parts that are none, or places outside the folder that an export writes."""
    if unknown := sorted(set(values["parts"]) - set(KINDS)):
        raise DataError(f"{file} names the part {shown(unknown[0])}: expected {', '.join(KINDS)}")
    source = values["source"]
    components = [*source.get("components", {}).values(), source.get("scheduler") or {}]
    folders = [entry["name"] for entry in components if "name" in entry]
    folders += [source["tokenizer"]] if "tokenizer" in source else []
    for name in folders:
        if name:  # a single network lies in no folder
            accepted(name, FOLDER, file, DataError)
    for entry in components:
        if "file" in entry:
            accepted(entry["file"], SAFETENSORS, file, DataError)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
