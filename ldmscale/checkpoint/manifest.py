"""manifest.json: what a checkpoint is and where each element of each tensor lies in it.

format       1; a reader refuses another one
step, images_seen, world_size, libraries
files        name, size, xxh3_128 of each rank's safetensors file
keys         NETWORK/KIND/NAME -> dtype, shape, shards [[offset, numel, number of the file], ...]
state        everything that is not a tensor, as plain JSON values
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ldmscale.errors import CheckpointError
from ldmscale.storage.atomic import write_text
from ldmscale.storage.digest import FileRecord, file_xxh3
from ldmscale.storage.names import RANK_FILE, accepted, shown
from ldmscale.storage.plain_values import Count, checked, parsed_object

FORMAT = 1
NAME = "manifest.json"
# Bytes of an element, by the names that torch gives its types; those that the files of tensors have.
BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_LIBRARIES = ("ldmscale", "torch", "deepspeed", "safetensors", "xxhash")


@dataclass(frozen=True)
class Shard:
    """Elements [offset, offset + numel) of a tensor lie in file number `file`."""

    offset: int
    numel: int
    file: int


@dataclass(frozen=True)
class Entry:
    """One whole tensor."""

    dtype: str  # as torch names it: "float32"
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]  # in order of offset, without holes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    step: int
    images_seen: int
    world_size: int
    libraries: dict[str, str]
    files: tuple[FileRecord, ...]
    keys: dict[str, Entry]
    state: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    rank: int
    file: FileRecord
    pieces: dict[str, tuple[str, tuple[int, ...], int, int]]  # key -> dtype, shape, offset, numel


def write_part(path: Path, part: Part) -> FileRecord:
    """Write the description of a rank's file; returns the description's own record."""
    write_text(path, json.dumps(asdict(part)))
    return FileRecord(path.name, path.stat().st_size, file_xxh3(path))


def read_part(path: Path, written: FileRecord) -> Part:
    """Read it back; raises CheckpointError if it is not what was written, and OSError."""
    if file_xxh3(path) != written.xxh3_128:
        raise CheckpointError(f"{path} is not as its rank wrote it")
    raw = json.loads(path.read_text(encoding="utf-8"))
    pieces = {
        key: (dtype, tuple(shape), offset, numel)
        for key, (dtype, shape, offset, numel) in raw["pieces"].items()
    }
    return Part(raw["rank"], FileRecord(**raw["file"]), pieces)


def merge(parts: Sequence[Part], *, step: int, state: Mapping[str, Any]) -> Manifest:
    """The manifest of a checkpoint from the descriptions of all its ranks.

    Raises CheckpointError, with all faults, if ranks are missing or pieces leave holes, overlap or disagree.
    """
    parts = sorted(parts, key=lambda part: part.rank)
    if [part.rank for part in parts] != list(range(len(parts))):
        raise CheckpointError(
            f"files of ranks {[part.rank for part in parts]}: expected each rank once, from 0"
        )
    found: dict[str, list[Shard]] = {}
    kinds: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for part in parts:
        for key, (dtype, shape, offset, numel) in part.pieces.items():
            found.setdefault(key, []).append(Shard(offset, numel, part.rank))
            kinds.setdefault(key, set()).add((dtype, shape))
    keys, faults = {}, []
    for key, shards in found.items():
        if len(kinds[key]) > 1:
            faults.append(f"{key}: ranks disagree about its dtype and shape: {sorted(kinds[key])}")
            continue
        ((dtype, shape),) = kinds[key]
        shards.sort(key=lambda shard: shard.offset)
        entry = Entry(dtype, shape, tuple(shards))
        starts = [shard.offset for shard in shards]
        ends = [shard.offset + shard.numel for shard in shards]
        if starts[0] != 0 or ends[-1] != entry.numel or starts[1:] != ends[:-1]:
            ranges = ", ".join(f"{low}..{high}" for low, high in zip(starts, ends, strict=True))
            faults.append(f"{key}: {entry.numel} elements, but the ranks wrote {ranges}")
        keys[key] = entry
    if faults:
        raise CheckpointError("\n".join(faults))
    return Manifest(
        step=step,
        images_seen=int(state.get("images_seen", 0)),
        world_size=len(parts),
        libraries=library_versions(),
        files=tuple(part.file for part in parts),
        keys=keys,
        state=dict(state),
    )


def library_versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint; absent libraries are left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Raises TypeError if the state is not made of JSON's values."""
    raw = {"format": FORMAT, **asdict(manifest)}
    raw["keys"] = {
        key: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "shards": [[shard.offset, shard.numel, shard.file] for shard in entry.shards],
        }
        for key, entry in manifest.keys.items()
    }
    write_text(folder / NAME, json.dumps(raw))


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError if there is none, or it is torn or forged, or of another format."""
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {folder} is not a complete checkpoint; take another one")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): take an older checkpoint") from error
    return parse_manifest(content, path)


def parse_manifest(content: bytes, source: object) -> Manifest:
    """The manifest in the bytes of a file. Raises CheckpointError, naming `source`, where they are no whole manifest.

    What it returns holds together: each tensor is covered once by shards that lie in files of the list, and no file is
    smaller than what it is to hold.
    """
    try:
        raw = parsed_object(content)
        if raw.get("format") != FORMAT:
            raise CheckpointError(
                f"{source} has format {shown(raw.get('format'))}, this version reads {FORMAT}: use the version that wrote it"
            )
        found = checked(_Manifest, raw)
        files = tuple(
            FileRecord(accepted(file.name, RANK_FILE, source, CheckpointError), file.size, file.xxh3_128)
            for file in found.files
        )
        if len({file.name for file in files}) < len(files):
            raise ValueError("a file is listed twice")
        keys = {
            key: Entry(entry.dtype, tuple(entry.shape), tuple(Shard(*shard) for shard in entry.shards))
            for key, entry in found.keys.items()
        }
        _check_places(keys, files)
    except ValueError as error:
        raise CheckpointError(f"{source} is damaged ({error}): take an older checkpoint") from error
    return Manifest(
        step=found.step,
        images_seen=found.images_seen,
        world_size=found.world_size,
        libraries=found.libraries,
        files=files,
        keys=keys,
        state=found.state,
    )


class _Entry(BaseModel):
    dtype: Literal[tuple(BYTES)]  # type: ignore[valid-type]
    shape: Annotated[list[Count], Field(max_length=64)]
    shards: Annotated[list[tuple[Count, Count, Count]], Field(min_length=1)]


class _File(BaseModel):
    name: object
    size: Count
    xxh3_128: str


class _Manifest(BaseModel):
    step: Count
    images_seen: Count
    world_size: Count
    libraries: dict[str, str]
    files: Annotated[list[_File], Field(min_length=1)]
    keys: dict[str, _Entry]
    state: dict[str, Any]


def _check_places(keys: Mapping[str, Entry], files: Sequence[FileRecord]) -> None:
    """Raises ValueError where shards leave holes, overlap, or lie outside the files."""
    held = [0] * len(files)
    for key, entry in keys.items():
        if key.count("/") < 2:
            raise ValueError(f"found the key {shown(key)}, expected NETWORK/KIND/NAME")
        end = 0
        for shard in entry.shards:
            if shard.file >= len(files):
                raise ValueError(f"{shown(key)} lies in file number {shard.file} of {len(files)}")
            if shard.offset != end:
                raise ValueError(f"{shown(key)} has a piece at element {shard.offset}, expected one at {end}")
            end += shard.numel
            held[shard.file] += shard.numel * BYTES[entry.dtype]
        if end != entry.numel:
            raise ValueError(f"{shown(key)} of shape {list(entry.shape)} has pieces of {end} elements")
    for file, size in zip(files, held, strict=True):
        if size > file.size:
            raise ValueError(f"{file.name} is to hold {size} bytes of tensors and has {file.size} bytes")
