"""Any source as a model: what it is, is seen from its files.

A source is a CompVis .ckpt or .safetensors, a diffusers folder, the folder that `ldmscale import` made, or a run of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmscale.config import (
    ClassEmbedderConfig,
    DiffusionConfig,
    ImportedUNetConfig,
    SpatialConfig,
    TextEncoderConfig,
)
from ldmscale.config.folders import config_folder
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.errors import ConfigError, DataError
from ldmscale.interop import compvis
from ldmscale.interop.compvis_config import Hints, find_yaml, load_yaml, read_hints
from ldmscale.interop.diffusers_folder import is_diffusers, read_folder
from ldmscale.interop.lightning import storable
from ldmscale.interop.model import MODEL_FILE, SCHEDULE_KEYS, Model, read_model
from ldmscale.interop.pickles import plain, read_pickle
from ldmscale.interop.tensors import read_safetensors
from ldmscale.storage.given_files import lines_of, read_given_text

log = logging.getLogger(__name__)

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Given:
    """What the user says of a source; it goes before what lies beside it."""

    config: Path | None = None  # CompVis' yaml
    unet: ImportedUNetConfig | None = None
    unet_heads: int | None = None
    unet_head_channels: int | None = None
    text_encoder: TextEncoderConfig | None = None
    text_heads: int | None = None
    text_head_channels: int | None = None
    class_embedder: ClassEmbedderConfig | None = None
    spatial: SpatialConfig | None = None
    diffusion: DiffusionConfig | None = None
    scale_factor: float | None = None
    latent_size: int | None = None


def read(path: Path, given: Given | None = None) -> Model:
    """The model in a file or folder that is not a run of ours. Its tensors are mapped, not read.

    Raises DataError with every fault of the source at once, ConfigError where there is nothing to read.
    """
    given = given or Given()
    if not path.exists():
        raise ConfigError(f"src={path}: there is no such file or folder")
    if path.is_file():
        model = _read_checkpoint(path, given)
    elif (path / MODEL_FILE).is_file():
        model = read_model(path)
    elif is_diffusers(path):
        model = read_folder(path)
    else:
        files = [p for p in sorted(path.iterdir()) if p.suffix in CHECKPOINTS and p.is_file()]
        if len(files) != 1:
            raise ConfigError(
                f"src={path} is no diffusers folder, no imported model, and holds {len(files)} checkpoints: give the file"
            )
        model = _read_checkpoint(files[0], given)
    _settle(model, given)
    return model


def _read_checkpoint(path: Path, given: Given) -> Model:
    lightning: dict[str, Any] = {}
    state: Mapping[str, Tensor]
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        checkpoint = read_pickle(path)
        state = compvis.find_state(checkpoint, path)
        lightning = {} if state is checkpoint else compvis.remainder(checkpoint)
    yaml_file = given.config or find_yaml(path)
    hints = Hints()
    if yaml_file is not None:
        hints = read_hints(load_yaml(yaml_file), str(yaml_file))
        log.info("architecture beyond the tensors from %s", yaml_file)
    elif isinstance(stored := plain(lightning.get("hyper_parameters")), dict):
        hints = read_hints(stored, "hyper_parameters")
    model = compvis.from_state(state, _over(hints, given))
    model.lightning = storable(lightning)
    model.source |= {"format": "compvis", "suffix": path.suffix}
    return model


def _over(hints: Hints, given: Given) -> Hints:
    """The user's word before the yaml's."""
    unet, text = given.unet, given.text_encoder
    heads = given.unet_heads or (unet.heads if unet else None)
    size = given.unet_head_channels or (unet.head_channels if unet else None)
    if heads is not None or size is not None:
        hints = replace(hints, heads=heads, head_channels=size)
    text_heads = given.text_heads or (text.heads if text else None)
    text_size = given.text_head_channels or (text.head_channels if text else None)
    if text_heads is not None or text_size is not None:
        hints = replace(hints, text_heads=text_heads, text_head_channels=text_size)
    if given.class_embedder is not None:
        hints = replace(hints, null_class=given.class_embedder.null_class)
    if given.spatial is not None:
        hints = replace(hints, halvings=given.spatial.halvings)
    if given.diffusion is not None:
        hints = replace(hints, diffusion=given.diffusion)
    if given.scale_factor is not None:
        hints = replace(hints, scale_factor=given.scale_factor)
    if given.latent_size is not None:
        hints = replace(hints, latent_size=given.latent_size)
    return hints


def _settle(model: Model, given: Given) -> None:
    """Compare whole given configurations with what was found; take what formats other than CompVis' leave open."""
    faults = []
    whole = {
        "unet": given.unet,
        "text_encoder": given.text_encoder,
        "class_embedder": given.class_embedder,
        "spatial_rescaler": given.spatial,
    }
    for name, wanted in whole.items():
        if wanted is None:
            continue
        if name not in model.parts:
            faults.append(f"{name}= is given, and the source has no {name}: remove it")
            continue
        found = model.parts[name].config
        free = ("dropout", "checkpointing", "tokenizer", "names")
        for key, value in vars(wanted).items():
            if key not in free and getattr(found, key) != value:
                faults.append(f"{name}.{key}={value} is given, and the source has {getattr(found, key)}")
    names = given.class_embedder.names if given.class_embedder is not None else None
    faults += [*_other_heads(model, given), *_other_scale_or_schedule(model, given)]
    if names not in (None, "found") and "class_embedder" in model.parts:
        faults += _named(model, Path(str(names)))
    if faults:
        raise ConfigError(faults)
    model.diffusion = given.diffusion or model.diffusion
    model.latent_size = given.latent_size or model.latent_size
    if given.scale_factor is not None and not model.scale_by(given.scale_factor):
        raise ConfigError(
            f"scale_factor={given.scale_factor} is given, and the source has no latents: remove it"
        )


def _named(model: Model, file: Path) -> list[str]:
    """Take the names of classes from a file of one a line."""
    if not file.is_file():
        return [f"class_embedder.names={file}: there is no such file; give one of a name a line, or null"]
    lines = lines_of(read_given_text(file, "give text in UTF-8, a name a line", ConfigError))
    names = tuple(line.strip() for line in lines if line.strip())
    config = model.parts["class_embedder"].config
    assert isinstance(config, ClassEmbedderConfig)
    if len(names) > config.classes:
        return [
            f"class_embedder.names={file} has {len(names)} names, and the source {config.classes} classes"
        ]
    model.class_names = names or None
    return []


def _other_heads(model: Model, given: Given) -> list[str]:
    """Heads that were given and are not those of the source, or come too late to change how its tensors were read."""
    told = {
        "unet": {"heads": given.unet_heads, "head_channels": given.unet_head_channels},
        "text_encoder": {"heads": given.text_heads, "head_channels": given.text_head_channels},
    }
    faults = []
    for name, values in told.items():
        part = model.parts.get(name)
        for key, value in values.items():
            if value is None:
                continue
            if part is None:
                faults.append(f"{name}.{key}={value} is given, and the source has no {name}: remove it")
            elif f"{name}.heads" in model.unknown:
                faults.append(
                    f"{name}.{key}={value} is given, and the source was imported without: import the checkpoint itself again"
                )
            elif (found := getattr(part.config, key)) != value:
                faults.append(f"{name}.{key}={value} is given, and the source has {found}: remove it")
    return faults


def _other_scale_or_schedule(model: Model, given: Given) -> list[str]:
    """Where a source states these, an export writes them as they were: another value could not be kept."""
    faults = []
    stored: float | None = None
    if "scale_factor" in model.kept:
        stored = float(model.kept["scale_factor"])
    components = model.source.get("components", {})
    if "autoencoder" in components:
        stored = components["autoencoder"]["config"].get("scaling_factor")
    if stored is not None and given.scale_factor is not None and abs(stored - given.scale_factor) > 1e-6:
        faults.append(
            f"scale_factor={given.scale_factor} is given, and the source has {stored:.6g}: remove it"
        )
    if "scheduler" in model.source and given.diffusion is not None and model.diffusion is not None:
        for key in SCHEDULE_KEYS:
            here, there = getattr(given.diffusion, key), getattr(model.diffusion, key)
            if here != there:
                faults.append(
                    f"diffusion.{key}={here} is given, and the source's scheduler has {there}: remove it"
                )
    return faults


def one_average(ema: bool | str) -> bool:
    """Models of other formats have one average at most. Raises ConfigError where another one is asked for by name."""
    if isinstance(ema, str):
        raise ConfigError(
            f"ema={ema}: only runs of ldmscale keep averages by name; give ema=true or ema=false"
        )
    return ema


def add_tokenizer(model: Model, name_or_folder: str, folder: Path) -> None:
    """Give the model a tokenizer by name or folder, laid out in `folder`. Raises DataError where it cannot be had."""
    text = model.text_encoder
    if text is None:
        raise ConfigError(f"tokenizer={name_or_folder}, but the source has no text encoder: remove it")
    tokenizer = Tokenizer.load(name_or_folder, text.max_tokens)
    if tokenizer.vocab_size > text.vocab_size:
        raise DataError(
            f"tokenizer={name_or_folder} has {tokenizer.vocab_size} ids and the text encoder {text.vocab_size}: it is another's"
        )
    tokenizer.save(folder)
    model.tokenizer = folder


def published_unets(found: ImportedUNetConfig) -> list[str]:
    """The files of conf/unet/ whose networks have the same shapes. They bring the heads, which no shape tells."""

    def shapes(config: ImportedUNetConfig) -> ImportedUNetConfig:
        return replace(config, heads=None, head_channels=None, dropout=0.0, checkpointing="off")

    names = []
    for path in sorted((config_folder() / "unet").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "defaults" not in values and shapes(ImportedUNetConfig(**values)) == shapes(found):
            names.append(path.stem)
    return names
