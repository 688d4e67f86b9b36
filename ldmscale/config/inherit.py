"""Settings that a job takes from the model that it reads, where its own configuration leaves them null.

Latents and figures belong to the image size that the first stage works at. A default would silently be another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ldmscale.checkpoint.run_folder import RunFolder, is_foreign
from ldmscale.config import DiffusionJob, EvaluateJob, Job, LatentsJob
from ldmscale.errors import ConfigError
from ldmscale.storage.digest import sha256

_J = TypeVar("_J", bound=Job)
_DEPTH = 4  # of first stages that name one another; a longer chain is a circle


def model_read(config: Job) -> tuple[str, str] | None:
    """The key and the path of the model whose image size the job's images should have; None where it reads none."""
    if isinstance(config, LatentsJob):
        return "first_stage.path", config.first_stage.path
    if isinstance(config, EvaluateJob):
        return "evaluate.model", config.evaluate.model
    if isinstance(config, DiffusionJob) and config.first_stage.path is not None:
        return "first_stage.path", config.first_stage.path
    return None


def inherited(config: _J) -> _J:
    """The configuration with what it leaves null and the model that it reads decides: `data.image_size`, `evaluate.out`."""
    if isinstance(config, EvaluateJob) and config.evaluate.out is None:
        out = _result_file(Path(config.evaluate.model), config.evaluate.kind)
        config = replace(config, evaluate=replace(config.evaluate, out=str(out)))
    if not isinstance(config, (LatentsJob, EvaluateJob)) or config.data.image_size is not None:
        return config
    found = model_read(config)
    assert found is not None
    size = trained_size(Path(found[1]))
    return config if size is None else replace(config, data=replace(config.data, image_size=size))


def check_inherited_size(config: LatentsJob | EvaluateJob) -> list[str]:
    """A size that is neither given nor stated by the model."""
    key, path = model_read(config) or ("", "")
    size, factor = config.data.image_size, _factor(Path(path))
    if size is not None and factor is not None and size % factor:
        return [
            f"data.image_size={size} is no multiple of the factor {factor} of the autoencoder in {key}={path}: give "
            f"data.image_size={-(-size // factor) * factor}"
        ]
    if size is not None:
        return []
    return [
        f"data.image_size is not set, and {key}={path} does not state the image size that it was trained at: give "
        "data.image_size=N, for instance 256"
    ]


def size_warning(config: LatentsJob | EvaluateJob | DiffusionJob) -> str | None:
    """What differs between the job's image size and that of the model that it reads; None where nothing does."""
    size = config.data.image_size
    found = model_read(config)
    if found is None or size is None or config.data.kind != "images":
        return None
    trained = trained_size(Path(found[1]))
    if trained is None or trained == size:
        return None
    return (
        f"data.image_size={size}, but {found[0]}={found[1]} was trained at {trained} px: its latents and figures at {size} px "
        f"are not those at {trained} px; give data.image_size={trained} unless that is meant"
    )


def trained_size(path: Path) -> int | None:
    """Pixels of the images that a model's first stage works on, as its files state them; None where they do not.

    Args:
        path: a run, one of its checkpoints, an imported model, or a folder in diffusers' format.
    """
    for _ in range(_DEPTH):
        if path.name.startswith("step_") and (path / "COMPLETE").is_file():
            path = path.parent.parent
        if is_foreign(path):
            return _foreign_size(path)
        try:
            values = RunFolder(path).config()
        except ConfigError:  # reported where the folder itself is checked
            return None
        data, first_stage = _section(values, "data"), _section(values, "first_stage")
        if data.get("kind", "images") == "images":
            return _pixels(data.get("image_size"))
        if not isinstance(first_stage.get("path"), str):
            return None
        path = Path(first_stage["path"])
    return None


def _factor(path: Path) -> int | None:
    """Pixels along one side of a latent position, as the model's files state it."""
    if path.name.startswith("step_") and (path / "COMPLETE").is_file():
        path = path.parent.parent
    if is_foreign(path):
        levels = _section(_section(_json(path / "model.json"), "parts"), "autoencoder").get("channel_mult")
        for name in ("vae", "vqvae", "."):
            levels = levels or _json(path / name / "config.json").get("block_out_channels")
    else:
        try:
            autoencoder = _section(RunFolder(path).config(), "autoencoder")
        except ConfigError:
            return None
        levels = None if autoencoder.get("kind") == "pixels" else autoencoder.get("channel_mult")
    return int(2 ** (len(levels) - 1)) if isinstance(levels, list) and levels else None


def _result_file(model: Path, kind: str) -> Path:
    """In the folder of a run; of models that others made or that cannot be written, in runs/evaluation/ here."""
    if model.is_dir() and not is_foreign(model) and os.access(model, os.W_OK | os.X_OK):
        return model / "evaluation" / f"{kind}.json"
    there = str(model.absolute())
    return Path("runs", "evaluation", f"{model.absolute().name}-{sha256(there)[:8]}", f"{kind}.json")


def _foreign_size(path: Path) -> int | None:
    """Of an imported model: its latent size times the autoencoder's factor. Of diffusers' AutoencoderKL: sample_size."""
    if not path.is_dir():
        return None
    imported = _json(path / "model.json")
    levels = _section(_section(imported, "parts"), "autoencoder").get("channel_mult")
    latent = _pixels(imported.get("latent_size"))
    if latent is not None and isinstance(levels, list) and levels:
        return int(latent * 2 ** (len(levels) - 1))
    for name in ("vae", "vqvae", "."):
        values = _json(path / name / "config.json")
        if str(values.get("_class_name", "")).startswith(("Autoencoder", "VQModel")):
            return _pixels(values.get("sample_size"))
    return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # reported by what reads the model
        return {}
    return values if isinstance(values, dict) else {}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _pixels(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
