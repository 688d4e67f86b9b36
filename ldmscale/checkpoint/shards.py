"""The bytes of a checkpoint: pieces of tensors as safetensors files, written by all ranks and read by anyone.

A piece is a range of elements of one flattened tensor. Each rank writes the pieces that it holds into one
file, so a save moves no weights between ranks, and a reader can take any range from whatever files hold it.
Nothing here needs torch.distributed, and no file is a pickle.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmscale.checkpoint import manifest as manifests
from ldmscale.checkpoint.manifest import Entry, Manifest, Part, read_manifest
from ldmscale.checkpoint.tensors import TensorFile, write_tensors
from ldmscale.errors import CheckpointError
from ldmscale.storage.atomic import write_text
from ldmscale.storage.digest import file_xxh3

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"  # the file that is written last, with the hash of the manifest
_LONGEST_HASH = 100  # characters of COMPLETE that are looked at


@contextmanager
def state_of(folder: Path) -> Iterator[None]:
    """Within, the training state of a checkpoint is taken apart: what it lacks or has of another type is a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        log.debug("the training state in %s does not fit", folder, exc_info=True)
        raise CheckpointError(
            f"the training state in {folder} does not fit ({type(error).__name__}: {error}): take an older checkpoint, or the "
            "version that wrote it"
        ) from error


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + values.numel()) of the flattened tensor `key` of shape `shape`.

    Keys read NETWORK/KIND/NAME, such as "denoiser/master/unet.conv_in.weight".
    """

    key: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor  # 1-D, in host memory, owned by the piece


def write_pieces(path: Path, rank: int, pieces: Sequence[Piece]) -> Part:
    """Write one rank's pieces as one safetensors file, flushed to the disk; returns its description.

    Raises CheckpointError if a key occurs twice, and OSError if the file cannot be written.
    """
    described: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for piece in pieces:
        if piece.key in described:
            raise CheckpointError(
                f"rank {rank} has two pieces with the key {piece.key}: a rank writes a key once"
            )
        dtype = str(piece.values.dtype).removeprefix("torch.")
        described[piece.key] = (dtype, piece.shape, piece.offset, piece.values.numel())
    # torch's distributed checkpoint reader finds the places of 1-D pieces by this header.
    places = json.dumps({piece.key: {"saved_offsets": [piece.offset]} for piece in pieces})
    file = write_tensors(path, {piece.key: piece.values for piece in pieces}, {"DCP_SHARDING_INFO": places})
    return Part(rank, file, described)


def mark_complete(folder: Path) -> None:
    """Add the file that makes a checkpoint count, and that vouches for its manifest."""
    write_text(folder / COMPLETE, file_xxh3(folder / manifests.NAME) + "\n")


class Reader:
    """One complete checkpoint, `step_00001000/`.

    Raises CheckpointError if it is not complete or a file is missing or has another size than it had.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / COMPLETE).is_file():
            raise CheckpointError(
                f"{self.folder} is not a complete checkpoint: it has no file {COMPLETE}. Take another one; "
                "`latest` beside it names the newest complete one."
            )
        self._check_vouched()
        self.manifest: Manifest = read_manifest(self.folder)
        self._open: dict[int, TensorFile] = {}
        faults = self._wrong_sizes()
        if faults:
            raise CheckpointError(f"{self.folder} is damaged: " + "; ".join(faults))

    def _check_vouched(self) -> None:
        manifest = self.folder / manifests.NAME
        if not manifest.is_file():
            return  # reading it says so
        try:
            with open(self.folder / COMPLETE, encoding="utf-8", errors="replace") as file:
                vouched = file.read(_LONGEST_HASH).strip()
            found = file_xxh3(manifest)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read ({error}): take an older checkpoint"
            ) from error
        if vouched != found:
            raise CheckpointError(
                f"{self.folder} is damaged: {manifests.NAME} has the hash {found}, {COMPLETE} says {vouched!r}; take an "
                "older checkpoint"
            )

    @property
    def state(self) -> dict[str, Any]:
        """Everything that was saved and is not a tensor."""
        return self.manifest.state

    def wrong_hashes(self, part: int = 0, parts: int = 1) -> list[str]:
        """Faults of the files number part, part + parts, ..., found by reading all their bytes."""
        faults = []
        for written in self.manifest.files[part::parts]:
            found = file_xxh3(self.folder / written.name)
            if found != written.xxh3_128:
                faults.append(f"{written.name} has the hash {found}, the manifest says {written.xxh3_128}")
        return faults

    def _wrong_sizes(self) -> list[str]:
        faults = []
        for written in self.manifest.files:
            path = self.folder / written.name
            if not path.is_file():
                faults.append(f"{written.name} is missing")
            elif path.stat().st_size != written.size:
                found = path.stat().st_size
                faults.append(f"{written.name} has {found} bytes, the manifest says {written.size}")
        return faults

    def networks(self) -> list[str]:
        """Names of the networks in it."""
        return sorted({key.split("/", 1)[0] for key in self.manifest.keys} - {"process"})

    def kinds(self, network: str) -> list[str]:
        """What there is of a network: "master", "exp_avg", "exp_avg_sq", "ema", "frozen", "buffer"."""
        found = {key.split("/", 2)[1] for key in self.manifest.keys if key.startswith(network + "/")}
        return sorted(found)

    def names(self, network: str, kind: str) -> list[str]:
        """Names of the tensors of one kind."""
        prefix = f"{network}/{kind}/"
        return [key[len(prefix) :] for key in self.manifest.keys if key.startswith(prefix)]

    def entry(self, key: str) -> Entry:
        try:
            return self.manifest.keys[key]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {key}") from None

    def fill(self, key: str, offset: int, out: Tensor) -> None:
        """Copy elements [offset, offset + out.numel()) of the flattened tensor into the 1-D tensor `out`."""
        entry = self.entry(key)
        end = offset + out.numel()
        if offset < 0 or end > entry.numel:
            raise CheckpointError(f"{key} has {entry.numel} elements; {offset}..{end} were asked for")
        for shard in entry.shards:
            low, high = max(shard.offset, offset), min(shard.offset + shard.numel, end)
            if low < high:
                self._file(shard.file).read(key, low - shard.offset, out[low - offset : high - offset])

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, in its own shape and dtype, in host memory."""
        entry = self.entry(key)
        out = torch.empty(entry.numel, dtype=getattr(torch, entry.dtype))
        self.fill(key, 0, out)
        return out.view(entry.shape)

    def weights(self, network: str, kind: str = "master") -> dict[str, Tensor]:
        """Whole weights of a network by parameter name: trained ones of one kind, frozen ones and buffers.

        `kind` is "master" (as trained) or "ema" (averaged). Parameters are float32; buffers keep their dtype.
        Raises CheckpointError if the network or the kind is not there.
        """
        names = self.names(network, kind)
        if not names:
            raise CheckpointError(
                f"{self.folder} has no {kind!r} weights of {network!r}; it has "
                + (
                    ", ".join(f"{name}: {' '.join(self.kinds(name))}" for name in self.networks())
                    or "no network"
                )
            )
        weights = {name: self.tensor(f"{network}/{kind}/{name}").float() for name in names}
        for name in self.names(network, "frozen"):
            weights[name] = self.tensor(f"{network}/frozen/{name}").float()
        for name in self.names(network, "buffer"):
            weights[name] = self.tensor(f"{network}/buffer/{name}")
        return weights

    def _file(self, number: int) -> TensorFile:
        if number not in self._open:
            self._open[number] = TensorFile(self.folder / self.manifest.files[number].name)
        return self._open[number]
