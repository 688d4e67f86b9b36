"""Latent shards: tars that plain webdataset reads, and a manifest of which autoencoder made them, and how.

    FOLDER/00000.tar       KEY.latent.npy, KEY.txt (caption), KEY.json (metadata)
    FOLDER/00000.json      the shard's counts, checksum and sums, written behind it
    FOLDER/manifest.json   the set: autoencoder, transform, shape, scale over all samples, list of shards

`latent.npy` holds moments [2C, h, w] (mean, then log-variance: every epoch draws a fresh posterior sample) or
a latent [C, h, w] (for VQ: before quantisation). A shard appears whole and its json after it: both there
means finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ldmscale.data.decode import LATENT, decode_array
from ldmscale.data.files import finished_file, write_file
from ldmscale.errors import DataError

FORMAT = "ldmscale-latents-1"
KINDS = ("moments", "latent")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class LatentFormat:
    """What all shards of a set share. Latents of two formats never mix.

    Attributes:
        autoencoder: hash of the autoencoder's weights and configuration.
        kind: "moments" or "latent".
        dtype: "float32" or "float16".
        shape: of one latent, (channels, height, width); moments have twice the channels.
        transform: how images were brought to size, as plain json values ({"size": 256, "crop": "center"}).
    """

    autoencoder: str
    kind: str
    dtype: str
    shape: tuple[int, int, int]
    transform: dict[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.dtype not in DTYPES:
            raise ValueError(
                f"kind must be one of {KINDS} and dtype one of {DTYPES}, got {self.kind!r}, {self.dtype!r}"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        # As it comes back from a manifest: tuples are lists there.
        object.__setattr__(self, "transform", json.loads(json.dumps(self.transform)))

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of `latent.npy`."""
        channels, height, width = self.shape
        return (2 * channels if self.kind == "moments" else channels, height, width)


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
    def load(cls, folder: str | Path) -> LatentManifest:
        """Reads the manifest of a set.

        Raises:
            DataError: if the folder holds no finished set, or one of another version of the format.
        """
        path = Path(folder) / "manifest.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{folder} has no manifest.json: no finished set of latents; run `ldmscale latents` to its "
                "end"
            ) from None
        except ValueError as error:
            raise DataError(
                f"{path} is damaged ({error}); run `ldmscale latents` again, it keeps finished shards"
            ) from error
        if record.get("version") != FORMAT:
            raise DataError(
                f"{path} is of version {record.get('version')!r}, expected {FORMAT!r}; make the latents anew"
            )
        return cls(
            format=LatentFormat(**record["format"]),
            shards=tuple(record["shards"]),
            samples=record["samples"],
            skipped=record["skipped"],
            scale_factor=record["scale_factor"],
            channel_mean=tuple(record["channel_mean"]),
            channel_std=tuple(record["channel_std"]),
        )

    def shard_paths(self, folder: str | Path) -> list[str]:
        return [str(Path(folder).absolute() / name) for name in self.shards]

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


class LatentShardWriter:
    """Writes one shard, which appears under its name when the `with` block ends without an error.

    Args:
        folder: of the set.
        name: file name of the shard, such as "00000.tar".
        format: of the set.
    """

    def __init__(self, folder: str | Path, name: str, format: LatentFormat) -> None:
        self.path = Path(folder) / name
        self.format = format
        self.samples = 0
        self.skipped = 0  # the caller counts source samples that it could not use
        channels = format.shape[0]
        self._sum = np.zeros(channels)
        self._squares = np.zeros(channels)

    def __enter__(self) -> LatentShardWriter:
        import webdataset  # imports torch

        with ExitStack() as stack:
            temporary = stack.enter_context(finished_file(self.path))
            stream = stack.enter_context(open(temporary, "wb"))
            # Fixed times: the same latents make the same bytes, whoever writes them and when.
            self._tar = stack.enter_context(webdataset.TarWriter(stream, mtime=0, encoder=False))
            self._files = stack.pop_all()
        return self

    def write(self, key: str, latent: np.ndarray, caption: str, metadata: Mapping[str, Any]) -> None:
        """Adds a sample.

        Args:
            key: of the image's sample.
            latent: moments [2C, h, w] or latent [C, h, w], any float dtype.
            caption: as the model is to see it.
            metadata: json values; goes to KEY.json.

        Raises:
            DataError: if the latent has another shape, or values that are not finite in the stored dtype.
        """
        if latent.shape != self.format.stored_shape:
            raise DataError(
                f"the latent of {key} has shape {latent.shape}, the set's is {self.format.stored_shape}"
            )
        with np.errstate(over="ignore"):  # an overflow is looked for in the next line
            stored = np.ascontiguousarray(latent, dtype=self.format.dtype)
        if not np.isfinite(stored).all():
            raise DataError(
                f"the latent of {key} has values that are not finite in {self.format.dtype}; store float32, "
                "or look at the image"
            )
        buffer = io.BytesIO()
        np.save(buffer, stored, allow_pickle=False)
        text = json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False).encode("utf-8")
        self._tar.write(
            {"__key__": key, LATENT: buffer.getvalue(), "txt": caption.encode("utf-8"), "json": text}
        )
        self._add_to_sums(stored.astype(np.float64))
        self.samples += 1

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
        self._files.__exit__(kind, error, trace)
        if kind is None:
            record = {
                "version": FORMAT,
                "format": asdict(self.format),
                "samples": self.samples,
                "skipped": self.skipped,
                "bytes": self.path.stat().st_size,
                "sha256": _sha256(self.path),
                "channel_sum": self._sum.tolist(),
                "channel_squares": self._squares.tolist(),
            }
            write_file(_record_path(self.path), json.dumps(record, indent=1).encode("utf-8"))


def is_finished(folder: str | Path, name: str, format: LatentFormat) -> bool:
    """Whether the set has this shard already.

    Raises:
        DataError: if it has it in another format: by another autoencoder, say.
    """
    path = Path(folder) / name
    record = _shard_record(path)
    if record is None or not path.is_file():
        return False
    if record["version"] != FORMAT or LatentFormat(**record["format"]) != format:
        raise DataError(
            f"{path} was made in another way ({_difference(record['format'], format)}); give another "
            "folder, or delete this one"
        )
    return bool(path.stat().st_size == record["bytes"])


def finish_set(folder: str | Path, names: Iterable[str], format: LatentFormat) -> LatentManifest:
    """Writes manifest.json from the records of all shards; one process calls it when all shards are finished.

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
    mean = np.sum([record["channel_sum"] for record in records], axis=0) / samples
    second = np.sum([record["channel_squares"] for record in records], axis=0) / samples
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
        {name: record[name] for name in ("samples", "skipped", "bytes", "sha256")} for record in records
    ]
    text = json.dumps(
        {"version": FORMAT, **asdict(manifest), "shard_records": dict(zip(shards, details, strict=True))},
        indent=1,
    )
    write_file(Path(folder) / "manifest.json", text.encode("utf-8"))
    return manifest


def read_latent(members: Mapping[str, bytes], format: LatentFormat) -> np.ndarray:
    """Returns a sample's moments or latent [stored_shape] in the dtype that it is stored in; may be read-only.

    Raises:
        DataError: if it is missing, damaged, or of another shape.
    """
    if LATENT not in members:
        raise DataError(f"has no {LATENT} (members: {', '.join(sorted(members)) or 'none'})")
    array = decode_array(members[LATENT])
    if array.shape != format.stored_shape:
        raise DataError(f"the latent has shape {array.shape}, the set's is {format.stored_shape}")
    return array


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _shard_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _difference(stored: dict[str, Any], wanted: LatentFormat) -> str:
    now = asdict(wanted)
    pairs = [(name, stored.get(name), now[name]) for name in now]
    return "; ".join(
        f"{name}: {was} there, {is_now} now"
        for name, was, is_now in pairs
        if json.dumps(was) != json.dumps(is_now)
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
