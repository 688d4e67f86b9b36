"""Faults of the model that a new run takes its weights from, by the configurations of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmscale.checkpoint.run_folder import RunFolder, is_foreign
from ldmscale.config import AutoencoderJob, DiffusionJob
from ldmscale.config.typed import plain, read
from ldmscale.errors import ConfigError

# Settings of each section that the shapes of its weights follow from.
_SHAPES = {
    "unet": (
        "in_channels", "out_channels", "channels", "channel_mult", "blocks_per_level", "attention_levels", "context_dim",
        "transformer_depth", "residual_updown", "scale_shift_norm",
    ),
    "autoencoder": (
        "kind", "latent_channels", "channels", "channel_mult", "blocks_per_level", "attention_levels", "mid_attention",
        "image_channels", "codebook_size", "codebook_dim",
    ),
    "text_encoder": ("kind", "max_tokens", "width", "layers", "vocab_size", "feedforward_mult"),
    "class_embedder": ("classes", "width", "null_class"),
    "spatial": ("kind", "channels", "map_classes"),
}  # fmt: skip
_TRAINED = {
    "autoencoder": ("autoencoder",),
    "diffusion": ("unet", "text_encoder", "class_embedder", "spatial"),
}


def check_warm_start(config: AutoencoderJob | DiffusionJob) -> list[str]:
    """A model whose weights do not fit would be found minutes later, when they are read."""
    if config.warm_start.path is None or _has_begun(config.run.dir):
        return []
    path = Path(config.warm_start.path)
    if not path.exists():
        return [
            f"warm_start.path={path}: there is nothing there; give a run folder, a checkpoint, or a model's files"
        ]
    if is_foreign(path):
        return []  # its files are compared by `setup.foreign_models`
    run = RunFolder(path.parent.parent if path.name.startswith("step_") else path)
    try:
        values = run.config()
        if values.get("job") != config.job:
            return [
                f"warm_start.path={path} is a run of the job {values.get('job')}: give one of {config.job}, which trains the "
                "same networks"
            ]
        there = plain(read(type(config), values))
    except ConfigError as error:
        return (
            [f"warm_start.path: {fault}" for fault in error.faults] if not run.config_file.is_file() else []
        )
    if not any(run.checkpoints.glob("step_*/COMPLETE")):
        return [f"warm_start.path={path}: the run has no complete checkpoint yet; wait for its first save"]
    return unfitting(there, config, str(path))


def unfitting(there: Mapping[str, Any], config: AutoencoderJob | DiffusionJob, origin: str) -> list[str]:
    """Settings by which weights of other shapes follow from the sections `there` than from `config`."""
    here = plain(config)
    faults = []
    for section in _TRAINED[config.job]:
        one, other = there.get(section), here.get(section)
        if one is None or other is None:
            # A text encoder that is not trained brings its own weights.
            trained = [
                part for part in (one, other) if part is not None and part.get("kind") not in ("clip", "t5")
            ]
            if trained and not (section == "spatial" and trained[0].get("map_classes") is None):
                has = "none" if one is None else "one"
                faults.append(f"warm_start.path={origin} has {has}, {section}: give the {section}= of there")
            continue
        if section == "text_encoder" and {one.get("kind"), other.get("kind")} & {"clip", "t5"}:
            continue
        keys = [key for key in _SHAPES[section] if _plain(one.get(key)) != _plain(other.get(key))]
        if (
            section == "text_encoder"
            and one["heads"] * one["head_channels"] != other["heads"] * other["head_channels"]
        ):
            keys += ["heads"]
        faults += [
            f"{section}.{key}={other.get(key)!r}, but warm_start.path={origin} has {one.get(key)!r}: its weights do not fit; "
            f"give {section}.{key}={one.get(key)}"
            for key in keys
        ]
    return faults


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _has_begun(folder: str) -> bool:
    """Whether the run has a checkpoint to resume from: then it takes nothing from another model."""
    return any(RunFolder(folder).checkpoints.glob("step_*/COMPLETE"))
