"""Writes latent shards: each appears whole, once, by whoever commits it first; and the manifest of a set (docs/data.md).

    FOLDER/00000.tar       KEY.latent.npy, KEY.txt (caption), KEY.json (metadata) [, KEY.latent_flipped.npy, KEY.tokens.npy]
    FOLDER/00000.json      the shard's counts, checksum, source and sums
    FOLDER/manifest.json   the set: format, scale over all samples, list of shards

How a shard is committed is told where it is written: `latent_folder`, and `latent_store` for s3:// and gs://.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ldmscale.data.images.decode import LATENT
from ldmscale.data.latents.folder import record_name
from ldmscale.data.latents.format import (
    FLIPPED,
    FORMAT,
    TOKENS,
    LatentFormat,
    LatentManifest,
    check_shard_record,
    from_stored,
    latent_format,
    to_stored,
)
from ldmscale.data.latents.store import LatentPlace, place_of
from ldmscale.errors import DataError

Source = Mapping[str, Any]
"""What a shard was made of, as json values: name, size and version of the shard of images, and what was taken of it."""


class LatentShardWriter:
    """Writes one shard, which appears under its name when the `with` block ends without an error.

    Args:
        folder: of the set, or its URL.
        name: file name of the shard, such as "00000.tar".
        format: of the set.
        source: what it is made of.
        check: called before the shard appears; raises if this process may not write any more (a lost lease).
    """

    def __init__(
        self,
        folder: str | Path | LatentPlace,
        name: str,
        format: LatentFormat,
        source: Source | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.place, self.name = place_of(folder), name
        self.format = format
        self.samples = 0
        self.skipped = 0  # the caller counts source samples that it could not use
        self._source, self._check = source, check
        channels = format.shape[0]
        self._sum = np.zeros(channels)
        self._squares = np.zeros(channels)

    def __enter__(self) -> LatentShardWriter:
        import webdataset  # imports torch

        with ExitStack() as stack:
            self._draft, stream = stack.enter_context(self.place.draft(self.name))
            self._stream = _Hashed(stream)
            # Fixed times: the same latents make the same bytes, whoever writes them and when.
            self._tar = stack.enter_context(webdataset.TarWriter(self._stream, mtime=0, encoder=False))
            self._files = stack.pop_all()
        return self

    def write(
        self,
        key: str,
        latent: np.ndarray,
        caption: str,
        metadata: Mapping[str, Any],
        *,
        flipped: np.ndarray | None = None,
        tokens: np.ndarray | None = None,
    ) -> None:
        """Adds a sample.

        Args:
            key: of the image's sample.
            latent: moments [2C, h, w] or latent [C, h, w], any float dtype.
            caption: as the model is to see it.
            metadata: json values; goes to KEY.json.
            flipped: the same of the mirrored image, where the format has them.
            tokens: ids of the caption [max_tokens], where the format has them.

        Raises:
            DataError: if a latent has another shape, or values that are not finite in the stored dtype.
        """
        if (flipped is not None) != self.format.flips or (tokens is not None) != bool(self.format.tokenizer):
            raise ValueError(f"{key}: flipped latents and tokens must be given as {self.format} says")
        stored = self._stored(key, latent)
        text = _json(metadata)
        # Arrays first: whatever the texts' lengths are, they are at the same place of every sample.
        members = {LATENT: _npy(stored)}
        if flipped is not None:
            members[FLIPPED] = _npy(self._stored(key, flipped))
        if tokens is not None:
            members[TOKENS] = _npy(tokens.astype(np.int32))
        for name, value in {**members, "txt": caption.encode("utf-8"), "json": text}.items():
            self._tar.write({"__key__": key, name: value})  # one by one, for it sorts what it is given
        self._add_to_sums(from_stored(stored).astype(np.float64))
        self.samples += 1

    def _stored(self, key: str, latent: np.ndarray) -> np.ndarray:
        if latent.shape != self.format.stored_shape:
            raise DataError(
                f"the latent of {key} has shape {latent.shape}, the set's is {self.format.stored_shape}"
            )
        stored = to_stored(latent, self.format.dtype)
        if not np.isfinite(from_stored(stored)).all():
            raise DataError(
                f"the latent of {key} has values that are not finite in {self.format.dtype}; store float32, "
                "or look at the image"
            )
        return stored

    def _add_to_sums(self, values: np.ndarray) -> None:
        channels = self.format.shape[0]
        mean = values[:channels]
        second = mean**2
        if self.format.kind == "moments":
            # E[z^2] of z ~ N(mean, variance); the clamp is the one of the posterior.
            second = second + np.exp(np.clip(values[channels:], -30.0, 20.0))
        self._sum += mean.mean(axis=(1, 2))
        self._squares += second.mean(axis=(1, 2))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._files:  # removes the draft at last, unless it has moved
            if kind is not None:
                return
            self._check()  # who has finished it meanwhile has thrown this draft away
            self._tar.close()
            self._stream.finish()
            record = {
                "version": FORMAT,
                "format": asdict(self.format),
                "source": self._source,
                "samples": self.samples,
                "skipped": self.skipped,
                "bytes": self._stream.bytes,
                "sha256": self._stream.digest.hexdigest(),
                "channel_sum": self._sum.tolist(),
                "channel_squares": self._squares.tolist(),
            }
            self.place.publish(self._draft, self.name, record, self._check)


class _Hashed:
    """A file whose checksum is known when its last byte is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._stream.write(data)

    def finish(self) -> None:
        """Brings everything to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())


def is_finished(
    folder: str | Path | LatentPlace, name: str, format: LatentFormat, source: Source | None = None
) -> bool:
    """Whether the set has this shard already.

    Raises:
        DataError: if it has it in another format (by another autoencoder, say), or of another source.
    """
    place = place_of(folder)
    path, record = f"{place}/{name}", place.settled(name)
    if record is None:
        return False
    known = record.get("version") == FORMAT
    if known:
        check_shard_record(record, f"{place}/{record_name(name)}")
    if not known or latent_format(record["format"]) != format:
        raise DataError(
            f"{path} was made in another way ({_difference(record.get('format'), asdict(format))}); give another "
            "folder, or delete this one"
        )
    was = record.get("source")
    if source is not None and was is not None and was != source:
        raise DataError(
            f"{path} was made of other images ({_difference(was, dict(source))}); give another folder, or delete "
            f"{place}/{record_name(name)} to have this shard made again"
        )
    return True


def finish_set(
    folder: str | Path | LatentPlace, names: Iterable[str], format: LatentFormat
) -> LatentManifest:
    """Writes manifest.json from the records of all shards.

    Sums are added in the shards' order, so the same shards give the same bytes, whoever made them.

    Raises:
        DataError: naming shards that are not finished, or if there is no sample at all.
    """
    shards, place = tuple(names), place_of(folder)
    place.look_anew()
    missing = [name for name in shards if not is_finished(place, name, format)]
    if missing:
        raise DataError(
            f"{len(missing)} latent shards in {place} are not finished (first: {missing[0]}); run "
            "`ldmscale latents` again"
        )
    records = [record for name in shards if (record := place.settled(name)) is not None]
    samples = sum(record["samples"] for record in records)
    if samples == 0:
        raise DataError(
            f"no sample of the source could be encoded into {place}; look at the data_ledger.jsonl"
        )
    mean = _total(records, "channel_sum") / samples
    second = _total(records, "channel_squares") / samples
    deviation = math.sqrt(max(float(second.mean() - mean.mean() ** 2), 1e-12))
    manifest = LatentManifest(
        format=format,
        shards=shards,
        samples=samples,
        skipped=sum(record["skipped"] for record in records),
        scale_factor=1.0 / deviation,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(np.sqrt(np.maximum(second - mean**2, 0.0)).tolist()),
    )
    details = [
        {name: record.get(name) for name in ("samples", "skipped", "bytes", "sha256", "source")}
        for record in records
    ]
    text = json.dumps(
        {"version": FORMAT, **asdict(manifest), "shard_records": dict(zip(shards, details, strict=True))},
        indent=1,
    )
    place.write_manifest(text.encode("utf-8"))
    return manifest


def _total(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """Sum over shards [C], exactly rounded."""
    return np.array([math.fsum(column) for column in zip(*(record[name] for record in records), strict=True)])


def _json(metadata: Mapping[str, Any]) -> bytes:
    record = dict(metadata)
    try:
        return json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: only its escape keeps it
        return json.dumps(record, sort_keys=True).encode("utf-8")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _difference(stored: object, now: Mapping[str, Any]) -> str:
    stored = stored if isinstance(stored, Mapping) else {}
    return "; ".join(
        f"{name}: {stored.get(name)} there, {value} now"
        for name, value in now.items()
        if json.dumps(stored.get(name)) != json.dumps(value)
    )
