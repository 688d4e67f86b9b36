"""Where the samples of a set of latents lie: read from the index that the set's writer has made, not from the shards.

A whole local set is mapped where it is. Of some of its shards, of several sets or of remote ones, the spans are put
together once, in the folder of indices (`shards.records`). Sets of version 1 have no index of their own, and a filter asks
for the samples' json: there the shards are looked through, as shards of images are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldmscale.data.latents.format import INDEX_FILE, LatentManifest, set_of
from ldmscale.data.shards.index import ShardIndex, written_header
from ldmscale.data.shards.records import find, writable_folder, write_index
from ldmscale.data.shards.scan import SPAN
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.urls import is_local, shard_states
from ldmscale.errors import DataError
from ldmscale.storage.digest import sha256
from ldmscale.storage.object_store import AbsentError, ShardState, Storage, StoreError

log = logging.getLogger(__name__)

_LISTED = 10


def open_latents(
    shards: Sequence[str],
    *,
    build_missing: bool = False,
    selection: Selection | None = None,
    storage: Storage | None = None,
) -> ShardIndex:
    """Opens the index of shards of latents, bucket by bucket where they have several shapes. As `ShardIndex.open`.

    Raises DataError as that does, for shards that are not those that were written, and for sets of other buckets.
    """
    store = storage or Storage()
    chosen = selection or Selection()
    folders = list(dict.fromkeys(set_of(shard)[0] for shard in shards))
    try:
        sets = {folder: LatentManifest.load(folder, store) for folder in folders}
    except StoreError:
        raise
    except DataError:  # held-out images, or tars of other makers
        return ShardIndex.open(shards, build_missing=build_missing, selection=selection, storage=storage)
    shapes = _common_shapes(sets)
    if chosen.everything and all(found.format.version > 1 for found in sets.values()):
        index = _written(shards, sets, build_missing, store)
        if index is not None:
            return index
    if shapes:
        chosen = replace(chosen, latent_shapes=shapes)
    return ShardIndex.open(shards, build_missing=build_missing, selection=chosen, storage=storage)


def _common_shapes(sets: dict[str, LatentManifest]) -> tuple[tuple[int, int], ...]:
    (first, found), *others = sets.items()
    for folder, other in others:
        if other.format.shapes != found.format.shapes:
            raise DataError(
                f"the latents in {folder} have the shapes {other.format.shapes or other.format.shape}, those in {first} "
                f"{found.format.shapes or found.format.shape}: train on sets that were made with the same data.bucket_* settings"
            )
    return tuple(shape[1:] for shape in found.format.shapes)


def _written(
    shards: Sequence[str], sets: dict[str, LatentManifest], build_missing: bool, storage: Storage
) -> ShardIndex | None:
    """The index as it was written; None where a file of it is missing."""
    places = [set_of(shard) for shard in shards]
    if any(name not in sets[folder].shards for folder, name in places):
        return None  # of another set: named when its manifest is compared
    states = _states(shards, storage)
    folder = places[0][0]
    try:
        if len(sets) == 1 and is_local(folder) and [name for _, name in places] == list(sets[folder].shards):
            index = ShardIndex(_local_file(folder), storage, shards)
            if index.names != list(sets[folder].shards):
                raise _damaged(folder, "it names other shards than the manifest")
        else:
            index = _merged(shards, places, states, build_missing, storage)
    except (FileNotFoundError, AbsentError) as error:
        log.warning("the index of the latents is missing (%s): the shards are looked through", error)
        return None
    changed = [
        f"shard {shard} has {state.size} bytes, and was written with {size}: restore it, or make the latents anew"
        for shard, state, size in zip(shards, states, index.sizes.tolist(), strict=True)
        if state.size != size
    ]
    if changed:
        raise DataError(
            [*changed[:_LISTED], *([f"... and {len(changed) - _LISTED} more"] if changed[_LISTED:] else [])]
        )
    if index.total == 0:
        raise DataError(f"the {len(shards)} shards of latents hold no sample: give others")
    return index


def _states(shards: Sequence[str], storage: Storage) -> list[ShardState]:
    found = shard_states(shards, storage)
    states = [state for state in found if isinstance(state, ShardState)]
    if len(states) < len(shards):
        absent = [
            f"shard {shard} cannot be found: {state}; check data.shards"
            for shard, state in zip(shards, found, strict=True)
            if isinstance(state, str)
        ]
        raise DataError(absent[:_LISTED])
    return states


def _merged(
    shards: Sequence[str],
    places: Sequence[tuple[str, str]],
    states: Sequence[ShardState],
    build_missing: bool,
    storage: Storage,
) -> ShardIndex:
    version = sha256(json.dumps([[state.size, state.version] for state in states]))[:16]
    name = f"latents-{sha256(json.dumps(list(shards)))[:16]}-{version}.idx"
    path = find(shards[0], name)
    if path is None:
        if not build_missing:
            raise DataError(
                f"the shards of latents ({shards[0]}, ...) have no index yet; start the job again"
            )
        path = writable_folder(shards[0]) / name
        parts = {folder: _part(folder, storage) for folder in dict.fromkeys(folder for folder, _ in places)}
        write_index(path, _merged_parts(places, parts))
    return ShardIndex(path, storage, shards)


def _merged_parts(places: Sequence[tuple[str, str]], parts: dict[str, ShardIndex]) -> Iterator[bytes]:
    numbers = {folder: {name: k for k, name in enumerate(part.names)} for folder, part in parts.items()}
    found = []
    for folder, name in places:
        if name not in numbers[folder]:
            raise _damaged(folder, f"it does not name {name}")
        found.append((parts[folder], numbers[folder][name]))
    bucketed = any(part.bucket_counts.shape[1] > 1 for part, _ in found)
    yield written_header(
        [name for _, name in places],
        [int(part.sizes[number]) for part, number in found],
        [int(part.counts[number]) for part, number in found],
        [part.bucket_counts[number].tolist() for part, number in found] if bucketed else None,
    )
    for part, number in found:
        count = int(part.counts[number])
        spans = np.empty(count, dtype=SPAN)
        spans["offset"], spans["nbytes"] = part.spans(np.full(count, number), np.arange(count))
        yield spans.tobytes()


def _part(folder: str, storage: Storage) -> ShardIndex:
    """The index of one set. That of a remote one is copied here first."""
    if is_local(folder):
        return ShardIndex(_local_file(folder), storage)
    content = storage.content(f"{folder}/{INDEX_FILE}")
    path = writable_folder(f"{folder}/{INDEX_FILE}") / f"latents-{sha256(content)[:24]}.idx"
    write_index(path, [content])
    return ShardIndex(path, storage)


def _local_file(folder: str) -> Path:
    path = Path(folder) / INDEX_FILE
    if not path.exists():
        raise FileNotFoundError(path)
    return path


def _damaged(folder: str, what: str) -> DataError:
    return DataError(
        f"{folder}/{INDEX_FILE} is damaged ({what}): delete it, and the shards are looked through instead; or run "
        "`ldmscale latents` again without the manifest.json, which writes both anew"
    )
