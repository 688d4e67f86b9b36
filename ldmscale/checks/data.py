"""Faults of what is read: shards, sizes, sources."""

from __future__ import annotations

from pathlib import Path

from ldmscale.config import AutoencoderConfig, DataConfig, QuickstartJob
from ldmscale.data.shards import expand
from ldmscale.errors import DataError

SYNTHETIC = "synthetic"


def check_shards(data: DataConfig, needs: str | None) -> list[str]:
    faults = []
    if needs and data.kind != needs:
        faults.append(f"data.kind={data.kind}: this job reads {needs}; give data=shards and data.shards=...")
    if data.kind == "images" and data.image_size is None:
        faults.append(
            "data.image_size is not set: images must be resized to a square; give data.image_size=256"
        )
    if data.caption != "txt" and not data.caption.startswith("json:"):
        faults.append(f"data.caption={data.caption!r}: expected txt or json:KEY")
    for name, patterns in (("data.shards", data.shards), ("data.heldout_shards", data.heldout_shards)):
        if patterns in (None, SYNTHETIC):
            continue
        assert patterns is not None
        try:
            expand(patterns, allow_pipe=data.allow_pipe)
        except DataError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    return faults


def check_image_size(data: DataConfig, autoencoder: AutoencoderConfig) -> list[str]:
    if data.image_size is not None and data.image_size % autoencoder.factor:
        size = -(-data.image_size // autoencoder.factor) * autoencoder.factor
        return [
            f"data.image_size={data.image_size} is no multiple of the autoencoder's factor {autoencoder.factor}: "
            f"give data.image_size={size}"
        ]
    return []


def check_fixed_view(data: DataConfig) -> list[str]:
    if data.crop == "random" or data.flip:
        return [
            "data.crop=random or data.flip=true: stored latents are one view of an image; give data.crop=center data.flip=false"
        ]
    return []


def check_local(key: str, path: str) -> list[str]:
    if "://" in path:
        return [f"{key}={path}: only local and shared folders can be written so far; give a path without ://"]
    return []


def check_source(config: QuickstartJob) -> list[str]:
    if config.data.root is not None and not Path(config.data.root).exists():
        return [f"data.root={config.data.root}: there is nothing there; give a folder of images"]
    if config.data.source == "folder" and config.data.root is None:
        return ["data.root is not set: data=folder needs the folder of your images"]
    return []
