"""Any source as a model: what it is, is seen from its files.

A source is a CompVis .ckpt or .safetensors, a diffusers folder, the folder that `ldmscale import` made, or a run of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmscale.config import (
    ClassEmbedderConfig,
    DiffusionConfig,
    SpatialConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldmscale.data.tokens import Tokenizer
from ldmscale.errors import ConfigError, DataError
from ldmscale.interop import compvis
from ldmscale.interop.compvis_config import Hints, find_yaml, load_yaml, read_hints
from ldmscale.interop.diffusers_folder import is_diffusers, read_folder
from ldmscale.interop.files import read_safetensors
from ldmscale.interop.model import MODEL_FILE, Model, read_model
from ldmscale.interop.pickles import plain, read_pickle
from ldmscale.stages.latent_scale import LatentScale

log = logging.getLogger(__name__)

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Given:
    """What the user says of a source; it goes before what lies beside it."""

    config: Path | None = None  # CompVis' yaml
    unet: UNetConfig | None = None
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
    model.lightning = {str(key): _storable(value) for key, value in lightning.items()}
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
        free = ("dropout", "checkpointing", "tokenizer")
        for key, value in vars(wanted).items():
            if key not in free and getattr(found, key) != value:
                faults.append(f"{name}.{key}={value} is given, and the source has {getattr(found, key)}")
    stored = model.kept.get("scale_factor")
    if (
        stored is not None
        and given.scale_factor is not None
        and abs(float(stored) - given.scale_factor) > 1e-6
    ):
        faults.append(
            f"scale_factor={given.scale_factor} is given, and the source has {float(stored):.6g}: remove it"
        )
    if faults:
        raise ConfigError(faults)
    model.diffusion = given.diffusion or model.diffusion
    model.latent_size = given.latent_size or model.latent_size
    if given.scale_factor is not None and (first := model.autoencoder) is not None:
        channels = first.latent_width
        model.scale = LatentScale(torch.zeros(channels), torch.full((channels,), given.scale_factor))


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


def _storable(value: Any) -> Any:
    """Plain values and tensors: classes by their names, other objects by their state."""
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return {_storable(k): _storable(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_storable(v) for v in value)
    if isinstance(value, (list, set)):
        return [_storable(v) for v in value]
    simple = plain(value)
    return _storable(simple) if simple is not value else str(value)
