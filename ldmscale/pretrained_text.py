"""What is known of a pretrained text encoder before it is opened: its config.json, of a folder or of the model hub.

Imports no torch: the checks of a configuration ask here before any device is touched.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmscale.errors import ConfigError

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
            f"{path} has no {what} ({', '.join(names)}): give a folder that save_pretrained of model and tokenizer wrote"
            for what, names in (
                ("config.json", ("config.json",)),
                ("weights", WEIGHTS),
                ("tokenizer", TOKENIZERS),
            )
            if not any((folder / name).is_file() for name in names)
        ]
        if faults:
            raise ConfigError(faults)
        file = folder / "config.json"
    else:
        file = _from_hub(path)
    return _described(json.loads(file.read_text(encoding="utf-8")))


def _described(settings: dict[str, Any]) -> TextShape:
    found = str(settings.get("model_type"))
    kind = KINDS.get(found)
    if kind == "clip":
        text = settings.get("text_config", settings)  # of CLIP as a whole, or of its text half
        return TextShape(kind, found, text.get("hidden_size"), text.get("max_position_embeddings", 77))
    return TextShape(kind, found, settings.get("d_model"), None)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:  # the local copy first: where there is no network the hub's client tries for most of a minute
            return Path(hf_hub_download(name, "config.json", local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # no network, no such name, no access: the hub's client raises many kinds
        raise ConfigError(
            f"{name} is no local folder and cannot be had from the model hub ({type(error).__name__}): on a machine with "
            "network fetch model and tokenizer, and give the folder of both"
        ) from error
