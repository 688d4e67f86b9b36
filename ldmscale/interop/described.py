"""The architecture of a model of another format as its configuration files state it, without reading a weight."""

from __future__ import annotations

from pathlib import Path

from ldmscale.errors import DataError
from ldmscale.interop import diffusers_config
from ldmscale.interop.model import KINDS, MODEL_FILE, PartConfig
from ldmscale.interop.tensors import read_json


def described(path: Path) -> dict[str, PartConfig]:
    """Configurations of the parts of an imported model or a diffusers folder; empty for checkpoints, which state none.

    What cannot be read is left out: reading the model itself reports it.
    """
    if (path / MODEL_FILE).is_file():
        return _imported(path / MODEL_FILE)
    found: dict[str, PartConfig] = {}
    for file in sorted([*path.glob("config.json"), *path.glob("*/config.json")]):
        try:
            values = read_json(file)
            part, reader = diffusers_config.READERS[diffusers_config.class_of(values) or ""]
            found[part] = reader(values)
        except (DataError, AttributeError, KeyError, TypeError, ValueError, IndexError, ArithmeticError):
            continue
    return found


def _imported(file: Path) -> dict[str, PartConfig]:
    try:
        parts = read_json(file)["parts"]
        return {name: KINDS[name](**values) for name, values in parts.items() if name in KINDS}
    except (DataError, AttributeError, KeyError, TypeError, ValueError):
        return {}
