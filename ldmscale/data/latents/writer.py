"""Writes latent shards: each appears whole, once; and the manifest of a set (docs/latents.md).

    FOLDER/00000.tar       KEY.latent.npy [, KEY.latent_flipped.npy, KEY.text.npy, KEY.tokens.npy], KEY.txt (caption),
                           KEY.json (metadata), KEY.sample.json; behind the last sample __index__
    FOLDER/00000.json      the shard's counts, checksum, source and sums
    FOLDER/samples.idx     where all samples lie
    FOLDER/manifest.json   the set: format, scale over all samples, list of shards

How a shard is committed is told where it is written: `latent_folder`, and `latent_store` for s3:// and gs://.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    INDEX_FILE,
    SHARD_INDEX,
    TEXT,
    TOKENS,
    VERSIONS,
    LatentFormat,
    LatentManifest,
    check_shard_record,
    from_stored,
    latent_format,
    to_stored,
    version_of,
)
from ldmscale.data.latents.sample_record import RECORD, SampleView, encode_record
from ldmscale.data.latents.store import LatentPlace, place_of
from ldmscale.data.shards.index import written_header
from ldmscale.data.shards.scan import SPAN
from ldmscale.errors import DataError

_AT_ONCE = 16  # shards whose ends are read together

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
        self._spans: list[tuple[int, int]] = []
        self._buckets = [0] * format.buckets
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
        bucket: int = 0,
        view: SampleView | None = None,
        captions: Mapping[str, str] | None = None,
        text: np.ndarray | None = None,
        text_tokens: int | None = None,
    ) -> None:
        """Adds a sample. Those of one bucket follow each other, the first bucket's first.

        Args:
            key: of the image's sample.
            latent: moments [2C, h, w] or latent [C, h, w], any float dtype.
            caption: as the model is to see it.
            metadata: json values; goes to KEY.json.
            flipped: the same of the mirrored image, where the format has them.
            tokens: ids of the caption [max_tokens], where the format has them.
            bucket: number of the aspect-ratio bucket.
            view, captions, text_tokens: as `sample_record.encode_record`.
            text: the caption's text encoding [max_tokens, width], where the format has them.

        Raises:
            DataError: if a latent has another shape, or values that are not finite in the stored dtype.
        """
        form = self.format
        given = (flipped is not None, tokens is not None, text is not None)
        if given != (form.flips, bool(form.tokenizer), form.text is not None):
            raise ValueError(f"{key}: flipped latents, tokens and text must be given as {form} has them")
        if any(self._buckets[bucket + 1 :]):
            raise ValueError(f"{key} is of bucket {bucket}: samples of a later one are written already")
        stored = self._stored(key, latent, bucket)
        # Arrays first: whatever the texts' lengths are, they are at the same place of every sample.
        members = {LATENT: _npy(stored)}
        if flipped is not None:
            members[FLIPPED] = _npy(self._stored(key, flipped, bucket))
        if text is not None:
            members[TEXT] = _npy(self._stored_text(key, text))
        if tokens is not None:
            members[TOKENS] = _npy(tokens.astype(np.int32))
        members |= {"txt": caption.encode("utf-8"), "json": _json(metadata)}
        if form.version > 1:
            members[RECORD] = encode_record(view, captions or {}, text_tokens)
        begin = self._tar.tarstream.offset
        for name, value in members.items():
            self._tar.write({"__key__": key, name: value})  # one by one, for it sorts what it is given
        self._spans.append((begin, self._tar.tarstream.offset - begin))
        self._add_to_sums(from_stored(stored).astype(np.float64))
        self.samples += 1
        self._buckets[bucket] += 1

    def _stored(self, key: str, latent: np.ndarray, bucket: int) -> np.ndarray:
        expected = self.format.stored_shape_of(bucket)
        if latent.shape != expected:
            raise DataError(f"the latent of {key} has shape {latent.shape}, the set's is {expected}")
        return _finite(latent, self.format.dtype, f"the latent of {key}", "the image")

    def _stored_text(self, key: str, text: np.ndarray) -> np.ndarray:
        form = self.format.text
        assert form is not None
        if text.shape != (form.max_tokens, form.width):
            raise DataError(
                f"the text encoding of {key} has shape {text.shape}, the set's is {(form.max_tokens, form.width)}"
            )
        return _finite(text, form.dtype, f"the text encoding of {key}", "the caption")

    def _write_index(self) -> int:
        """Adds the member with the places of the samples, and returns where its values begin."""
        spans = np.array(self._spans, dtype=SPAN).tobytes()
        member = tarfile.TarInfo(SHARD_INDEX)
        member.size, member.mtime, member.mode = len(spans), 0, 0o444
        self._tar.tarstream.addfile(member, io.BytesIO(spans))
        padded: int = -(-len(spans) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return int(self._tar.tarstream.offset) - padded

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
            index = self._write_index() if self.format.version > 1 else None
            self._tar.close()
            self._stream.finish()
            record = {
                "version": VERSIONS[self.format.version],
                "format": self.format.record(),
                "source": self._source,
                "samples": self.samples,
                "skipped": self.skipped,
                "bytes": self._stream.bytes,
                "sha256": self._stream.digest.hexdigest(),
                "channel_sum": self._sum.tolist(),
                "channel_squares": self._squares.tolist(),
            }
            if index is not None:
                record["index_offset"] = index
            if self.format.shapes:
                record["buckets"] = self._buckets
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
    version = version_of(record)
    if version is not None:
        check_shard_record(record, f"{place}/{record_name(name)}")
    if version is None or latent_format(record["format"], version) != format:
        made = {"version": record.get("version"), **_mapping(record.get("format"))}
        now = {"version": VERSIONS[format.version], **format.record()}
        raise DataError(
            f"{path} was made in another way ({_difference(made, now)}); give another folder, or delete this one"
        )
    was = record.get("source")
    if source is not None and was is not None and was != source:
        raise DataError(
            f"{path} was made of other images ({_difference(was, dict(source))}); give another folder, or delete "
            f"{place}/{record_name(name)} to have this shard made again"
        )
    return True


def written_version(folder: str | Path | LatentPlace) -> int | None:
    """The version of the format of the shards that are there already; None if there are none that this code knows."""
    record = place_of(folder).any_record()
    return None if record is None else version_of(record)


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
    described = ["samples", "skipped", "bytes", "sha256", "source"]
    if format.version > 1:
        described += ["index_offset", *(["buckets"] if format.shapes else [])]
        place.write_parts(INDEX_FILE, _index_parts(place, shards, records, format))
    details = [{name: record.get(name) for name in described} for record in records]
    content = {
        "version": VERSIONS[format.version],
        **asdict(manifest),
        "format": format.record(),
        "shard_records": dict(zip(shards, details, strict=True)),
    }
    place.write_manifest(json.dumps(content, indent=1).encode("utf-8"))
    return manifest


def _index_parts(
    place: LatentPlace, shards: Sequence[str], records: Sequence[Mapping[str, Any]], format: LatentFormat
) -> Iterator[bytes]:
    """The set's index: a line of json, then the spans of all samples, read from the shards' ends."""
    yield written_header(
        shards,
        [record["bytes"] for record in records],
        [record["samples"] for record in records],
        [record["buckets"] for record in records] if format.shapes else None,
    )

    def spans(name: str, record: Mapping[str, Any]) -> bytes:
        size, begin = record["samples"] * SPAN.itemsize, record["index_offset"]
        found = place.read(name, begin, begin + size)
        if len(found) != size:
            raise DataError(
                f"{place}/{name} is damaged: found {len(found)} bytes of its index, expected {size}; delete it and run "
                "`ldmscale latents` again"
            )
        return found

    with ThreadPoolExecutor(_AT_ONCE, "index") as readers:
        for start in range(0, len(shards), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            yield from readers.map(spans, shards[part], records[part])


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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


def _finite(values: np.ndarray, dtype: str, what: str, cause: str) -> np.ndarray:
    stored = to_stored(values, dtype)
    if not np.isfinite(from_stored(stored)).all():
        raise DataError(
            f"{what} has values that are not finite in {dtype}; store float32, or look at {cause}"
        )
    return stored


def _difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {stored.get(name)} there, {value} now"
        for name, value in now.items()
        if json.dumps(stored.get(name)) != json.dumps(value)
    )
