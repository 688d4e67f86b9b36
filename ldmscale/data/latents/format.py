"""The format of a set of latents: its versions, its manifest, and how one of its samples is read (docs/latents.md).

`writer` writes sets of version 2, and finishes those of version 1 that are there already. Both are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ldmscale.data.images.decode import LATENT, decode_array
from ldmscale.data.shards.urls import is_local, local_path
from ldmscale.errors import DataError
from ldmscale.storage.names import TAR, accepted
from ldmscale.storage.object_store import AbsentError, Storage
from ldmscale.storage.plain_values import Count, Flag, checked, parsed_object

VERSIONS = {1: "ldmscale-latents-1", 2: "ldmscale-latents-2"}
NEWEST = 2
INDEX_FILE = "samples.idx"
"""File of a set of version 2 that says where each sample lies, in the form of `shards.index`."""
SHARD_INDEX = "__index__"
"""Last member of a shard of version 2: the spans of its samples. webdataset skips members named so."""
KINDS = ("moments", "latent")
DTYPES = ("float32", "float16", "bfloat16")
FLIPPED = "latent_flipped.npy"
"""Member name of the latent of the mirrored image."""
TOKENS = "tokens.npy"
"""Member name of the caption's token ids, int32."""

TEXT = "text.npy"
"""Member name of the outputs of a frozen text encoder."""
LatentShape = tuple[int, int, int]
"""(channels, height, width)."""


@dataclass(frozen=True)
class TextFormat:
    """The stored outputs of a frozen text encoder.

    Attributes:
        encoder: digest of its weights.
        tokenizer: fingerprint of its tokenizer.
        max_tokens, width: of `text.npy`, [max_tokens, width].
        dtype: as `LatentFormat.dtype`.
    """

    encoder: str
    tokenizer: str
    max_tokens: int
    width: int
    dtype: str

    @property
    def stored_type(self) -> np.dtype[Any]:
        """Of `text.npy`: uint16 for bfloat16."""
        return _stored_type(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Of the values of `text.npy`."""
        return self.max_tokens * self.width * self.stored_type.itemsize


@dataclass(frozen=True)
class LatentFormat:
    """What all shards of a set share. Latents of two formats never mix.

    Attributes:
        autoencoder: hash of the autoencoder's weights and configuration.
        kind: "moments" or "latent".
        dtype: "float32", "float16" or "bfloat16", which numpy lacks: stored as the upper halves of float32, uint16.
        shape: of one latent, (channels, height, width); moments have twice the channels.
        transform: how images were brought to size, as plain json values ({"size": 256, "crop": "center"}).
        flips: whether the latents of the mirrored images are there, too.
        tokenizer: fingerprint of the tokenizer whose ids are there, too; None: captions only.
        shapes: of the latents of each aspect-ratio bucket, the square's first; empty: all have `shape`.
        text: the outputs of a frozen text encoder that are there, too.
        version: of the format. Version 1 has neither shapes nor text, and nothing is known of a sample's image.
    """

    autoencoder: str
    kind: str
    dtype: str
    shape: LatentShape
    transform: dict[str, Any]
    flips: bool = False
    tokenizer: str | None = None
    shapes: tuple[LatentShape, ...] = ()
    text: TextFormat | None = None
    version: int = NEWEST

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.dtype not in DTYPES:
            raise ValueError(
                f"kind must be one of {KINDS} and dtype one of {DTYPES}, got {self.kind!r}, {self.dtype!r}"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        if self.shapes and (
            self.shapes[0] != self.shape or {shape[0] for shape in self.shapes} != {self.shape[0]}
        ):
            raise ValueError(f"shapes must begin with {self.shape} and have its channels, got {self.shapes}")
        if self.version == 1 and (self.shapes or self.text):
            raise ValueError("a set of version 1 has one shape, and no outputs of a text encoder")
        # As it comes back from a manifest: tuples are lists there.
        object.__setattr__(self, "transform", json.loads(json.dumps(self.transform)))

    @property
    def buckets(self) -> int:
        """How many aspect-ratio buckets there are; 1 where all latents have one shape."""
        return max(1, len(self.shapes))

    def shape_of(self, bucket: int) -> LatentShape:
        """Shape of the latents of a bucket."""
        return self.shapes[bucket] if self.shapes else self.shape

    def stored_shape_of(self, bucket: int) -> LatentShape:
        """Shape of `latent.npy` in a bucket."""
        channels, height, width = self.shape_of(bucket)
        return (2 * channels if self.kind == "moments" else channels, height, width)

    @property
    def stored_shape(self) -> LatentShape:
        """Shape of `latent.npy`, of the first bucket."""
        return self.stored_shape_of(0)

    @property
    def stored_type(self) -> np.dtype[Any]:
        """Of `latent.npy`: uint16 for bfloat16."""
        return _stored_type(self.dtype)

    def record(self) -> dict[str, Any]:
        """As it stands in a file, whose version says the rest: `latent_format` reads it."""
        found = asdict(self)
        del found["version"]
        if self.version == 1:
            del found["shapes"], found["text"]
        return found

    def mixes_with(self, other: LatentFormat) -> bool:
        """Whether latents of both can be trained on together. The version of the format makes no difference."""
        return replace(self, version=NEWEST) == replace(other, version=NEWEST)


def _stored_type(dtype: str) -> np.dtype[Any]:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid")

    encoder: str
    tokenizer: str
    max_tokens: Count
    width: Count
    dtype: Literal[DTYPES]  # type: ignore[valid-type]


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid")

    autoencoder: str
    kind: Literal[KINDS]  # type: ignore[valid-type]
    dtype: Literal[DTYPES]  # type: ignore[valid-type]
    shape: tuple[Count, Count, Count]
    transform: dict[str, Any]
    flips: Flag = False
    tokenizer: str | None = None
    shapes: list[tuple[Count, Count, Count]] = []
    text: _Text | None = None


class _Set(BaseModel):
    format: dict[str, Any]
    shards: list[object]
    samples: Count
    skipped: Count
    scale_factor: _Finite
    channel_mean: list[_Finite]
    channel_std: list[_Finite]


class _ShardRecord(BaseModel):
    version: str
    format: _Format
    source: dict[str, Any] | None = None
    samples: Count
    skipped: Count
    bytes: Count
    sha256: object
    channel_sum: list[_Finite]
    channel_squares: list[_Finite]
    index_offset: Count | None = None  # of version 2
    buckets: list[Count] | None = None  # of a set with several shapes


def version_of(record: Mapping[str, Any]) -> int | None:
    """The version of the format of a shard's record or a manifest; None if this code does not know it."""
    return next((number for number, name in VERSIONS.items() if record.get("version") == name), None)


def latent_format(record: object, version: int) -> LatentFormat:
    """The format that a file of some version describes. Raises ValueError where it describes none."""
    found = checked(_Format, record).model_dump()
    if found["text"] is not None:
        found["text"] = TextFormat(**found["text"])
    return LatentFormat(**found, version=version)


def check_shard_record(record: dict[str, Any], source: object) -> None:
    """Raises DataError where the record of a finished shard lacks a part, or has one of another type."""
    try:
        found = checked(_ShardRecord, record)
        if version_of(record) != 1 and found.index_offset is None:
            raise ValueError("index_offset is missing")
    except ValueError as error:
        raise DataError(
            f"{source} is damaged ({error}); delete it and run `ldmscale latents` again, which makes this shard anew"
        ) from error


@dataclass(frozen=True)
class LatentManifest:
    """A finished set of latent shards.

    Attributes:
        format: what they share.
        shards: file names, in order.
        samples: in all.
        skipped: samples of the source that could not be used.
        scale_factor: 1 / standard deviation over all values of all latents; multiply latents by it.
        channel_mean, channel_std: per channel over all samples; of moments, those of the posterior's samples.
    """

    format: LatentFormat
    shards: tuple[str, ...]
    samples: int
    skipped: int
    scale_factor: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]

    @classmethod
    def load(cls, folder: str | Path, storage: Storage | None = None) -> LatentManifest:
        """Reads the manifest of a set, in a folder or behind a URL.

        Raises:
            DataError: if the folder holds no finished set, or one of another version of the format.
            StoreError: if its store cannot be reached.
        """
        path = f"{folder}/manifest.json"
        try:
            if is_local(path):
                record = parsed_object(Path(path).read_bytes())
            else:
                record = parsed_object((storage or Storage()).content(path))
        except (FileNotFoundError, AbsentError):
            raise DataError(
                f"{folder} has no manifest.json: no finished set of latents; run `ldmscale latents` to its "
                "end"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({error}); run `ldmscale latents` again, it keeps finished shards"
            ) from error
        version = version_of(record)
        if version is None:
            raise DataError(
                f"{path} is of version {record.get('version')!r}, expected one of {', '.join(VERSIONS.values())}; make the "
                "latents anew, or read them with the ldmscale that made them"
            )
        try:
            found = checked(_Set, record)
            shards = tuple(accepted(name, TAR, path, DataError) for name in found.shards)
            format = latent_format(record["format"], version)
            if not len(found.channel_mean) == len(found.channel_std) == format.shape[0]:
                raise ValueError("the statistics are not of as many channels as the latents")
        except ValueError as error:
            raise DataError(
                f"{path} is damaged ({error}); run `ldmscale latents` again, it keeps finished shards"
            ) from error
        return cls(
            format=format,
            shards=shards,
            samples=found.samples,
            skipped=found.skipped,
            scale_factor=found.scale_factor,
            channel_mean=tuple(found.channel_mean),
            channel_std=tuple(found.channel_std),
        )

    def check_autoencoder(self, autoencoder: str, folder: str | Path) -> None:
        """Compares the autoencoder that made the latents with the run's.

        Raises:
            DataError: if another autoencoder made the latents.
        """
        if self.format.autoencoder != autoencoder:
            raise DataError(
                f"the latents in {folder} were made by autoencoder {self.format.autoencoder}, this run has "
                f"{autoencoder}; "
                "name the autoencoder that made them, or run `ldmscale latents` with this one into another "
                "folder"
            )


def set_of(shard: str) -> tuple[str, str]:
    """Folder or URL of a shard's set, and the shard's name."""
    where = local_path(shard) if is_local(shard) else shard.split("?", 1)[0]
    folder, _, name = where.rpartition("/")
    return folder, name


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats as they are stored: of `dtype`, rounded to nearest even; bfloat16 as uint16."""
    with np.errstate(over="ignore"):  # whoever stores looks for what is not finite
        if dtype != "bfloat16":
            return np.ascontiguousarray(values, dtype=dtype)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_stored(stored: np.ndarray) -> np.ndarray:
    """What `to_stored` made, as float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def read_text(members: Mapping[str, bytes], form: TextFormat) -> np.ndarray:
    """Returns the stored text encoding of a sample, [max_tokens, width], as `read_latent` returns latents.

    Raises DataError if it is missing, damaged, or of another shape or dtype.
    """
    if TEXT not in members:
        raise DataError(f"has no {TEXT} (members: {', '.join(sorted(members)) or 'none'})")
    try:
        array = decode_array(members[TEXT])
    except DataError as error:
        raise DataError(f"its {TEXT} is no array of finite floats") from error
    if array.shape != (form.max_tokens, form.width) or array.dtype != form.stored_type:
        raise DataError(
            f"its {TEXT} is {array.dtype} of shape {array.shape}, the set's are {form.stored_type} of shape "
            f"{(form.max_tokens, form.width)}"
        )
    return from_stored(array) if array.dtype == np.uint16 else array


def read_latent(
    members: Mapping[str, bytes], format: LatentFormat, name: str = LATENT, bucket: int = 0
) -> np.ndarray:
    """Returns a sample's moments or latent [stored_shape] in the dtype that it is stored in; may be read-only.

    bfloat16 comes as float32. `name` may be that of the mirrored image.

    Raises:
        DataError: if it is missing, damaged, or of another shape or dtype.
    """
    if name not in members:
        raise DataError(f"has no {name} (members: {', '.join(sorted(members)) or 'none'})")
    array = decode_array(members[name])
    if array.shape != format.stored_shape_of(bucket):
        raise DataError(f"the latent has shape {array.shape}, the set's is {format.stored_shape_of(bucket)}")
    if (array.dtype == np.uint16) != (format.dtype == "bfloat16"):
        raise DataError(f"the latent is of {array.dtype}, the set's are of {format.dtype}")
    return from_stored(array) if array.dtype == np.uint16 else array
