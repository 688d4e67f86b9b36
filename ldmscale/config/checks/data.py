"""Faults of what is read: shards, sizes, sources."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ldmscale.config import AutoencoderConfig, DataConfig, QuickstartJob, RunConfig
from ldmscale.config.schema.data import WeightedShardsConfig
from ldmscale.data.images.buckets import bucket_shapes
from ldmscale.data.shards.filter import Condition
from ldmscale.data.shards.urls import expand
from ldmscale.errors import ConfigError, DataError
from ldmscale.storage.object_store import Storage

SYNTHETIC = "synthetic"


def check_shards(
    data: DataConfig, needs: str | None, *, absent: bool = False, sized: bool = True
) -> list[str]:
    """`absent`: the job reports shards that are not there. `sized`: the job has an image size of its own."""
    faults = []
    if needs and data.kind != needs:
        faults.append(f"data.kind={data.kind}: this job reads {needs}; give data=shards and data.shards=...")
    if sized and data.kind == "images" and data.image_size is None:
        faults.append(
            "data.image_size is not set: images must be resized to a square; give data.image_size=256"
        )
    kind, _, name = data.caption.partition(":")
    if data.caption != "txt" and not (kind in ("json", "captions") and name):
        faults.append(
            f"data.caption={data.caption!r}: expected txt or json:KEY (or, of latents, captions:NAME)"
        )
    elif kind == "captions" and data.kind == "images":
        faults.append(f"data.caption={data.caption!r}: images have no such member; give txt or json:KEY")
    if data.label != "cls" and not (data.label.startswith("json:") and data.label != "json:"):
        faults.append(f"data.label={data.label!r}: expected cls or json:KEY")
    if not data.boxes.startswith("json:") or data.boxes == "json:":
        faults.append(f"data.boxes={data.boxes!r}: expected json:KEY")
    if not 0 < data.min_crop_share <= data.max_crop_share:
        faults.append(
            f"data.min_crop_share={data.min_crop_share} and data.max_crop_share={data.max_crop_share}: expected "
            "0 < data.min_crop_share <= data.max_crop_share <= 1"
        )
    faults += _selection_faults(data)
    if data.decoder == "turbo" and not find_spec("simplejpeg"):
        faults.append(
            "data.decoder=turbo needs simplejpeg: install ldmscale[fast], or give data.decoder=pillow"
        )
    given = data.storage
    astray = given.endpoint is not None and not given.endpoint.startswith(("http://", "https://"))
    if astray:
        faults.append(
            f"data.storage.endpoint={given.endpoint!r}: expected a URL, such as https://store.example.org:9000"
        )
    # Whoever starts a job wants to hear of a wrong endpoint now, not after the patience of a running one.
    storage = Storage(given.options, given.endpoint, min(10.0, given.patience_seconds), given.request_seconds)
    for patterns in _patterns(data):
        if patterns == SYNTHETIC or (astray and "://" in str(patterns)):  # there is nothing to ask
            continue
        try:
            expand(patterns, allow_pipe=data.allow_pipe, storage=storage, absent=absent)
        except DataError as error:
            name = "data.heldout_shards" if patterns is data.heldout_shards else "data.shards"
            faults += [f"{name}: {fault}" for fault in error.faults]
            if isinstance(patterns, str) and "," in patterns and "{" not in patterns:
                faults.append(
                    f"{name}={patterns} is one path with commas: several are a list, {name}=[{patterns}]"
                )
    return faults


def _patterns(data: DataConfig) -> list[str | tuple[str, ...]]:
    sets = [entry.shards for entry in data.shards if isinstance(entry, WeightedShardsConfig)]
    found: list[str | tuple[str, ...]] = list(sets)
    if not sets:
        found.append(data.shards if isinstance(data.shards, str) else tuple(map(str, data.shards)))
    return found if data.heldout_shards is None else [*found, data.heldout_shards]


def _selection_faults(data: DataConfig) -> list[str]:
    faults: list[str] = []
    if data.filter is not None:
        try:
            Condition(data.filter)
        except ConfigError as error:
            faults += error.faults
    if data.max_caption_words is not None and data.max_caption_words < data.min_caption_words:
        faults.append(
            f"data.min_caption_words={data.min_caption_words} is above data.max_caption_words="
            f"{data.max_caption_words}: no caption fits"
        )
    if data.kind == "latents" and (data.bucket_step is not None or data.min_image_side):
        faults.append(
            "data.bucket_step or data.min_image_side is set, but latents are no images: select when you make them"
        )
    if data.bucket_step is not None and data.image_size is not None:
        try:
            bucket_shapes(data.image_size, data.bucket_step, data.bucket_max_ratio)
        except ConfigError as error:
            faults += error.faults
    weights = [entry.weight is None for entry in data.shards if isinstance(entry, WeightedShardsConfig)]
    if any(weights) and not all(weights):
        faults.append("data.shards gives a weight to some sets and not to others: give it to all, or to none")
    return faults


def check_image_size(data: DataConfig, autoencoder: AutoencoderConfig) -> list[str]:
    if data.bucket_step is not None and data.bucket_step % autoencoder.factor:
        return [
            f"data.bucket_step={data.bucket_step} is no multiple of the autoencoder's factor {autoencoder.factor}: give "
            f"data.bucket_step={-(-data.bucket_step // autoencoder.factor) * autoencoder.factor}"
        ]
    if data.image_size is not None and data.image_size % autoencoder.factor:
        size = -(-data.image_size // autoencoder.factor) * autoencoder.factor
        return [
            f"data.image_size={data.image_size} is no multiple of the autoencoder's factor {autoencoder.factor}: "
            f"give data.image_size={size}"
        ]
    return []


def check_fixed_view(data: DataConfig) -> list[str]:
    if data.crop == "random" or data.flip or data.min_crop_share < 1:
        return [
            "data.crop=random, data.flip=true or data.min_crop_share below 1: one fixed view of each image is read here; give "
            "data.crop=center data.flip=false data.min_crop_share=1 data.max_crop_share=1 (latents.flips=true stores the mirrored "
            "view, too)"
        ]
    return []


def check_local(key: str, path: str) -> list[str]:
    if "://" in path:
        return [
            f"{key}={path}: a folder that is written must be local or shared, since several processes append to its files "
            "and hold it by a lease"
            + (
                f"; give a path without ://, and checkpoint.url={path} for a copy of every checkpoint and of the "
                "metrics there, from which a lost run folder comes back"
                if key == "run.dir"
                else "; give a path without ://"
            )
        ]
    return check_folder(key, path)


def check_run(run: RunConfig) -> list[str]:
    """Faults of the run folder, and of a name that it is derived from."""
    parts = run.name.split("/")
    if any(part in ("", ".", "..") or not part.isprintable() or len(part.encode()) > 255 for part in parts):
        return [
            f"run.name={run.name!r} is no name of a folder: expected printable text without empty, '.' and '..' parts, of 255 "
            "bytes at most; give another run.name"
        ]
    return check_local("run.dir", run.dir)


def check_folder(key: str, path: str | Path) -> list[str]:
    """A folder that will be made or written: of what is there already, the last part must be a folder that lets us."""
    place = os.path.abspath(path)
    while not os.path.exists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        return [f"{key}={path}: {place} is a file; give a folder"]
    if not os.access(place, os.W_OK | os.X_OK):
        return [f"{key}={path}: {place} cannot be written (no permission, or read-only); give another folder"]
    return []


def check_writable(key: str, path: str) -> list[str]:
    """A folder, or a bucket of a store in which one process alone can create an object."""
    if "://" not in path:
        return check_folder(key, path)
    protocol, _, rest = path.partition("://")
    if protocol not in ("s3", "s3a", "gs", "gcs") or not rest.strip("/"):
        return [f"{key}={path}: give a folder without ://, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"]
    if any(sign in rest for sign in "*?[]{}"):
        return [f"{key}={path}: a place that is written has no signs of a pattern (* ? [ ] {{ }})"]
    return []


def check_source(config: QuickstartJob) -> list[str]:
    faults = check_run(config.run)
    if config.data.root is not None and not Path(config.data.root).exists():
        faults.append(f"data.root={config.data.root}: there is nothing there; give a folder of images")
    if config.data.source == "folder" and config.data.root is None:
        faults.append("data.root is not set: data=folder needs the folder of your images")
    return faults
