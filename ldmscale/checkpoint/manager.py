"""Which checkpoints a run has: writing one whole or not at all, finding the newest, pruning.

    checkpoints/step_00001000/rank_00000.safetensors ... manifest.json COMPLETE
    checkpoints/latest         the name of the newest complete one, for people and scripts

A checkpoint is written as step_00001000.tmp. When every rank has said that its file is on the disk, rank 0
checks that no element is missing, writes the manifest, renames the folder, and adds COMPLETE. What lacks
COMPLETE does not exist.

Other endings: `.replaced` is the former content of a step that is being saved again, `.abandoned` a
checkpoint of a later step than the one saved now (the run went back and took another course); it goes when
the run has passed it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ldmscale.checkpoint import manifest as manifests
from ldmscale.checkpoint.files import sync, write_text
from ldmscale.checkpoint.storage import COMPLETE, Piece, Reader, write_pieces
from ldmscale.distributed import collectives
from ldmscale.errors import CheckpointError

log = logging.getLogger(__name__)

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(folder: Path) -> int:
    found = _STEP.fullmatch(folder.name)
    assert found is not None
    return int(found.group(1))


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Folders of complete checkpoints, oldest step first. Damage is not looked for."""
    found = [
        path.parent for path in Path(folder).glob(f"step_*/{COMPLETE}") if _STEP.fullmatch(path.parent.name)
    ]
    return sorted(found, key=_step_of)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """For one process that only reads: the newest complete checkpoint whose files have their sizes."""
    for candidate in reversed(complete_checkpoints(folder)):
        try:
            return Reader(candidate).folder
        except CheckpointError as error:
            log.warning("%s", error)
    return None


class CheckpointManager:
    """The checkpoints of one run. `save` and `newest` are collective: all ranks call them together.

    The newest `keep_last` complete checkpoints are kept, and never fewer than two.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 2) -> None:
        self.folder = Path(folder)
        self.keep_last = max(2, keep_last)
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1

    def save(self, step: int, pieces: Sequence[Piece], state: Mapping[str, Any]) -> Path:
        """Write a complete checkpoint and prune old ones; returns its folder.

        `pieces` are this rank's share, `state` is of JSON's values and equal on all ranks (rank 0's is
        taken). Raises CheckpointError, the same on every rank, if any rank could not do its part; then what
        was there before is still there.
        """
        target = self.folder / folder_name(step)
        temporary = target.with_name(target.name + ".tmp")
        try:
            self._together("make the folder", lambda: _fresh(temporary), main_only=True)
            self._together("write its file", lambda: self._write(temporary, pieces))
            self._together("commit", lambda: self._commit(temporary, target, step, state), main_only=True)
        except CheckpointError:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.rank == 0:
            self._prune(step)
        return target

    def newest(self) -> Path | None:
        """The newest complete checkpoint whose files are whole, or None if there never was a complete one.

        A damaged one is logged and passed over. Raises CheckpointError if all are damaged, since starting
        from nothing is then for the user to decide.
        """
        if self.rank == 0:
            self._put_back()
        names = collectives.broadcast_object([path.name for path in complete_checkpoints(self.folder)])
        faults = []
        for name in reversed(names):
            fault = self._faults(self.folder / name)
            if not fault:
                return self.folder / name
            faults += fault
            log.warning("checkpoint %s cannot be used, looking at the one before: %s", name, "; ".join(fault))
        if faults:
            raise CheckpointError(
                f"every complete checkpoint in {self.folder} is damaged; move it away to start anew:\n"
                + "\n".join(faults)
            )
        return None

    def _faults(self, folder: Path) -> list[str]:
        """Faults that any rank finds; the hashes of the files are shared out among the ranks."""
        try:
            found = Reader(folder).wrong_hashes(self.rank, self.world_size)
        except (CheckpointError, OSError) as error:
            found = [str(error)]
        return list(dict.fromkeys(collectives.gather_lists(found)))

    def _together(self, action: str, work: Callable[[], None], *, main_only: bool = False) -> None:
        """Do one part of a save on all ranks, or on rank 0, and agree on whether it went well everywhere."""
        failure: Exception | None = None
        if self.rank == 0 or not main_only:
            try:
                work()
            except Exception as error:  # whatever it was, the other ranks must not wait for this one
                failure = error
        mine = [] if failure is None else [f"rank {self.rank} could not {action}: {failure!r}"]
        if failures := collectives.gather_lists(mine):
            raise CheckpointError(
                f"no checkpoint was written to {self.folder}; older ones are as they were. "
                + "; ".join(failures)
            ) from failure

    def _write(self, temporary: Path, pieces: Sequence[Piece]) -> None:
        path = temporary / f"rank_{self.rank:05d}.safetensors"
        part = write_pieces(path, self.rank, pieces)
        manifests.write_part(path.with_suffix(".json"), part)

    def _commit(self, temporary: Path, target: Path, step: int, state: Mapping[str, Any]) -> None:
        described = sorted(temporary.glob("rank_*.json"))
        if len(described) != self.world_size:
            raise CheckpointError(f"{temporary} has the files of {len(described)} of {self.world_size} ranks")
        parts = [manifests.read_part(path) for path in described]
        manifests.write_manifest(temporary, manifests.merge(parts, step=step, state=state))
        for path in described:
            path.unlink()
        sync(temporary)
        for later in complete_checkpoints(self.folder):
            if _step_of(later) > step:
                log.warning("checkpoint %s is of a later step than %d: set aside", later.name, step)
                _set_aside(later, ".abandoned")
        if target.exists():
            _set_aside(target, ".replaced")
        os.replace(temporary, target)
        write_text(target / COMPLETE, "")
        sync(self.folder)
        write_text(self.folder / LATEST, target.name + "\n")

    def _put_back(self) -> None:
        """Undo a save of an existing step that was killed between its two renamings."""
        for old in self.folder.glob("step_*.replaced"):
            target = old.with_suffix("")
            if (old / COMPLETE).is_file() and not (target / COMPLETE).is_file():
                log.warning("a save of %s was cut off: its former content is put back", target.name)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(old, target)

    def _prune(self, step: int) -> None:
        """Remove what is not needed any more. Failing to is no reason to stop a run."""
        complete = complete_checkpoints(self.folder)
        useless = complete[: -self.keep_last]
        for path in self.folder.glob("step_*"):
            name, _, ending = path.name.partition(".")
            number = _STEP.fullmatch(name)
            if number is None or not path.is_dir():
                continue
            passed = int(number.group(1)) <= step
            unfinished = not ending and not (path / COMPLETE).is_file() and passed
            if unfinished or ending in ("tmp", "replaced") or (ending == "abandoned" and passed):
                useless.append(path)
        for path in useless:
            try:
                # First, so that half a folder is never taken for whole.
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path)
            except OSError as error:
                log.warning("cannot remove the old checkpoint %s: %s", path, error)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _set_aside(folder: Path, ending: str) -> None:
    aside = folder.with_name(folder.name + ending)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
