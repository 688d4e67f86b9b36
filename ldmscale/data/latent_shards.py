"""Writes latent shards: each appears whole, once, by whoever commits it first; and the manifest of a set (docs/data.md).

    FOLDER/00000.tar       KEY.latent.npy, KEY.txt (caption), KEY.json (metadata) [, KEY.latent_flipped.npy, KEY.tokens.npy]
    FOLDER/00000.json      the shard's counts, checksum, source and sums
    FOLDER/manifest.json   the set: format, scale over all samples, list of shards

The json is the commit. It is linked into place, which succeeds for one process only; before, the tar stands beside it
under a name made of its checksum, from where anyone may move it to its own. So no process, however late it wakes, can
replace a finished shard or mix two, and a death at any moment leaves a shard that is finished or not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ldmscale.data.decode import LATENT
from ldmscale.data.files import write_file
from ldmscale.data.latents import (
    FLIPPED,
    FORMAT,
    TOKENS,
    LatentFormat,
    LatentManifest,
    from_stored,
    to_stored,
)
from ldmscale.errors import DataError

Source = Mapping[str, Any]
"""What a shard was made of, as json values: name, size and version of the shard of images, and what was taken of it."""


class LatentShardWriter:
    """Writes one shard, which appears under its name when the `with` block ends without an error.

    Args:
        folder: of the set.
        name: file name of the shard, such as "00000.tar".
        format: of the set.
        source: what it is made of.
        check: called before the shard appears; raises if this process may not write any more (a lost lease).
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        format: LatentFormat,
        source: Source | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = Path(folder) / name
        self.format = format
        self.samples = 0
        self.skipped = 0  # the caller counts source samples that it could not use
        self._source, self._check = source, check
        channels = format.shape[0]
        self._sum = np.zeros(channels)
        self._squares = np.zeros(channels)

    def __enter__(self) -> LatentShardWriter:
        import webdataset  # imports torch

        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_draft_prefix(self.path), suffix=".part", dir=self.path.parent)
        self._draft = Path(name)
        with ExitStack() as stack:
            stack.callback(self._draft.unlink, missing_ok=True)
            self._stream = _Hashed(stack.enter_context(os.fdopen(handle, "wb")))
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
        text = json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False).encode("utf-8")
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
            _publish(self._draft, self.path, record, self._check)


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
        os.fchmod(self._stream.fileno(), 0o644)


def _publish(draft: Path, path: Path, record: dict[str, Any], check: Callable[[], None]) -> None:
    """Commits a shard, or throws it away if another process has finished it meanwhile."""
    named = _named(path, record)
    check()
    try:
        os.replace(draft, named)
    except FileNotFoundError:
        if _settled(path) is None:
            raise
        return  # who finished it has tidied up
    handle, name = tempfile.mkstemp(prefix=_draft_prefix(path), suffix=".json.part", dir=path.parent)
    text = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(json.dumps(record, indent=1).encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(text, 0o644)
        if not _link(text, _record_path(path)):
            if _settled(path) is not None:
                named.unlink(missing_ok=True)
                return
            check()  # a record whose tar somebody has lost or cut: make the shard anew
            os.replace(named, path)
            os.replace(text, _record_path(path))
        _settled(path)
    finally:
        text.unlink(missing_ok=True)
    for other in path.parent.glob(f"{_draft_prefix(path)}*.part"):
        other.unlink(missing_ok=True)  # of those who were killed, or come too late


def _link(text: Path, record: Path) -> bool:
    """Gives a file its second name; False if that is taken."""
    try:
        os.link(text, record)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the lease alone must do
        if record.exists():
            return False
        os.replace(text, record)
    return True


def _settled(path: Path) -> dict[str, Any] | None:
    """The record of a finished shard; None if it is not finished. Ends what a killed process had committed."""
    record = _shard_record(path)
    if record is None:
        return None
    with suppress(FileNotFoundError):
        os.replace(_named(path, record), path)
    try:
        whole = path.stat().st_size == record["bytes"]
    except OSError:
        return None
    return record if whole else None


def is_finished(folder: str | Path, name: str, format: LatentFormat, source: Source | None = None) -> bool:
    """Whether the set has this shard already.

    Raises:
        DataError: if it has it in another format (by another autoencoder, say), or of another source.
    """
    path = Path(folder) / name
    record = _settled(path)
    if record is None:
        return False
    if record["version"] != FORMAT or LatentFormat(**record["format"]) != format:
        raise DataError(
            f"{path} was made in another way ({_difference(record['format'], asdict(format))}); give another "
            "folder, or delete this one"
        )
    was = record.get("source")
    if source is not None and was is not None and was != source:
        raise DataError(
            f"{path} was made of other images ({_difference(was, dict(source))}); give another folder, or delete "
            f"{_record_path(path)} to have this shard made again"
        )
    return True


def finish_set(folder: str | Path, names: Iterable[str], format: LatentFormat) -> LatentManifest:
    """Writes manifest.json from the records of all shards.

    Sums are added in the shards' order, so the same shards give the same bytes, whoever made them.

    Raises:
        DataError: naming shards that are not finished, or if there is no sample at all.
    """
    shards = tuple(names)
    missing = [name for name in shards if not is_finished(folder, name, format)]
    if missing:
        raise DataError(
            f"{len(missing)} latent shards in {folder} are not finished (first: {missing[0]}); run "
            "`ldmscale latents` again"
        )
    records = [
        record for record in (_shard_record(Path(folder) / name) for name in shards) if record is not None
    ]
    samples = sum(record["samples"] for record in records)
    if samples == 0:
        raise DataError(
            f"no sample of the source could be encoded into {folder}; look at its data_ledger.jsonl"
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
    write_file(Path(folder) / "manifest.json", text.encode("utf-8"))
    for draft in Path(folder).glob(".*.tar.*.part"):
        draft.unlink(missing_ok=True)  # of those who were killed
    return manifest


def _total(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """Sum over shards [C], exactly rounded."""
    return np.array([math.fsum(column) for column in zip(*(record[name] for record in records), strict=True)])


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _draft_prefix(path: Path) -> str:
    return f".{path.name}."


def _named(path: Path, record: Mapping[str, Any]) -> Path:
    return path.with_name(f"{_draft_prefix(path)}{record['sha256']}.part")


def _shard_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {stored.get(name)} there, {value} now"
        for name, value in now.items()
        if json.dumps(stored.get(name)) != json.dumps(value)
    )
