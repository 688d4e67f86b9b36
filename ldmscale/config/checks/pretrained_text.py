"""What is known of a pretrained text encoder before it is opened: its config.json, of a folder or of the model hub.

Imports no torch: the checks of a configuration ask here before any device is touched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmscale.config import FrozenTextConfig, TextEncoderConfig
from ldmscale.errors import ConfigError
from ldmscale.storage import names
from ldmscale.storage.given_files import read_given_object
from ldmscale.storage.hub import hub_file
from ldmscale.storage.names import has_form, shown

_REMEDY = "give a folder that save_pretrained of model and tokenizer wrote"
# model_type in config.json, and what text_encoder.kind calls it
KINDS = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class TextShape:
    """What a config.json says of a text encoder."""

    kind: str | None  # "clip", "t5"; None: another one
    model_type: str
    width: int | None
    max_tokens: int | None  # None: no limit (T5 knows distances of tokens, not places)


def text_shape(path: str) -> TextShape:
    """What the config.json of a folder or hub name says.

    Raises ConfigError where there is none, or where a folder lacks weights or a tokenizer.
    """
    if os.path.isdir(path):
        folder = Path(path)
        faults = [
            f"{path} has no {what} ({', '.join(files)}): give a folder that save_pretrained of model and tokenizer wrote"
            for what, files in (
                ("config.json", ("config.json",)),
                ("weights", WEIGHTS),
                ("tokenizer", TOKENIZERS),
            )
            if not any((folder / name).is_file() for name in files)
        ]
        if faults := [*faults, *parts_elsewhere(folder)]:
            raise ConfigError(faults)
        file = folder / "config.json"
    else:
        file = _from_hub(path)
    return _described(read_given_object(file, _REMEDY, ConfigError))


def parts_elsewhere(folder: Path) -> list[str]:
    """Faults of the indexes of a model that is split into files: names of files that are not in its folder."""
    faults: list[str] = []
    for index in (folder / name for name in WEIGHTS if name.endswith(".index.json")):
        if not index.is_file():
            continue
        try:
            places = read_given_object(index, _REMEDY, ConfigError)["weight_map"]
            named = places.values()
            foreign = [name for name in named if not has_form(name, names.WEIGHTS)]
        except ConfigError as error:
            faults += error.faults
            continue
        except (KeyError, TypeError, AttributeError):
            faults.append(f"{index} has no weight_map of tensors and files: download it again")
            continue
        if foreign:
            faults.append(
                f"{index} names {shown(foreign[0])}: expected {names.WEIGHTS.words}; download it again"
            )
    return faults


def _described(settings: dict[str, Any]) -> TextShape:
    found = str(settings.get("model_type"))
    kind = KINDS.get(found)
    if kind == "clip":
        text = settings.get("text_config", settings)  # of CLIP as a whole, or of its text half
        return TextShape(kind, found, text.get("hidden_size"), text.get("max_position_embeddings", 77))
    return TextShape(kind, found, settings.get("d_model"), None)


def _from_hub(name: str) -> Path:
    try:
        return hub_file(name, "config.json")
    except Exception as error:  # no network, no such name, no access: the hub's client raises many kinds
        raise ConfigError(
            f"{name} is no local folder and cannot be had from the model hub ({type(error).__name__}): on a machine with "
            "network fetch model and tokenizer, and give the folder of both"
        ) from error


def check_text_encoder(text: TextEncoderConfig | FrozenTextConfig | None) -> list[str]:
    """A trained one has none here: nothing about it lies on the disk."""
    if not isinstance(text, FrozenTextConfig):
        return []
    try:
        found = text_shape(text.path)
    except ConfigError as error:
        return [f"text_encoder.path: {fault}" for fault in error.faults]
    if found.kind != text.kind:
        known = "give another folder" if found.kind is None else f"give text_encoder.kind={found.kind}"
        return [
            f"text_encoder.kind={text.kind}, but {text.path} is a {found.model_type}: {known}; clip and t5 are read"
        ]
    faults: list[str] = []
    if found.width is not None and found.width != text.width:
        faults.append(
            f"text_encoder.width={text.width}, but {text.path} has {found.width}: give text_encoder.width={found.width} "
            f"unet.context_dim={found.width}"
        )
    if found.max_tokens is not None and text.max_tokens > found.max_tokens:
        faults.append(
            f"text_encoder.max_tokens={text.max_tokens}, but {text.path} has {found.max_tokens} places: give "
            f"text_encoder.max_tokens={found.max_tokens}"
        )
    return faults
