"""Writing checkpoints whole or not at all beside the training, finding the newest, keeping as many as asked.

    checkpoints/step_00001000/rank_00000.safetensors ... manifest.json COMPLETE
    checkpoints/latest         the name of the newest complete one, for people and scripts

A save has two parts, each a thread that contains no collective. First every rank writes its file. The
training asks between two steps, with the flag that it exchanges anyway, whether all are done; then the ranks
exchange their outcomes, and if all went well rank 0 commits: it checks that every file is what its rank
reports and that no element is missing, writes the manifest, renames the folder, adds COMPLETE and `latest`,
and removes what need not be kept. What lacks COMPLETE does not exist.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ldmscale.checkpoint import folders
from ldmscale.checkpoint import manifest as manifests
from ldmscale.checkpoint.background import Background
from ldmscale.checkpoint.files import FileRecord, sync, write_text
from ldmscale.checkpoint.folders import Kept, Retention, complete_checkpoints, folder_name, step_of
from ldmscale.checkpoint.storage import Piece, Reader, mark_complete, write_pieces
from ldmscale.distributed import collectives
from ldmscale.errors import CheckpointError, LdmscaleError

log = logging.getLogger(__name__)

LATEST = "latest"
_VISIBLE_SECONDS = 60.0  # how long another rank's file may take to appear on a shared file system


def newest_checkpoint(folder: str | Path) -> Path | None:
    """For one process that only reads: the newest complete checkpoint whose files have their sizes."""
    for candidate in reversed(complete_checkpoints(folder)):
        try:
            return Reader(candidate).folder
        except CheckpointError as error:
            log.warning("%s", error)
    return None


@dataclass(frozen=True)
class _Report:
    """What one rank says of its part of a save."""

    rank: int
    failure: str | None
    described: FileRecord | None  # the file that describes its pieces


@dataclass
class _Saving:
    """The save that is under way."""

    step: int
    state: Mapping[str, Any]
    temporary: Path
    target: Path
    began: float = field(default_factory=time.perf_counter)
    writing: Background[FileRecord] | None = None
    committing: Background[None] | None = None  # rank 0 only
    committed: bool = False  # all ranks have agreed on the files

    @property
    def work(self) -> Background[Any] | None:
        return self.committing if self.committed else self.writing


class CheckpointManager:
    """The checkpoints of one run. All ranks call `begin`, `advance`, `finish`, `save` and `newest` together.

    Between two steps the trainer calls `advance`, once no rank is `busy`. A save that fails leaves older
    checkpoints as they were and is told loudly; more than `max_failed_saves` in a row, or one that
    `finish(must_hold=True)` waits for, raise CheckpointError on every rank.

    `attempt` numbers the starts of the run, and `fence` raises on rank 0 once another start has taken the run
    over: a process that came back from the dead publishes nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        retention: Retention | None = None,
        max_failed_saves: int = 0,
        attempt: int = 0,
        fence: Callable[[], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.retention = retention or Retention()
        self.max_failed_saves, self.attempt = max_failed_saves, attempt
        self.failed_saves = 0  # in a row
        self.last_seconds = 0.0  # from the copy of the last save to its end
        self._fence = fence
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1
        self._saving: _Saving | None = None
        self._known: dict[str, Kept] = {}
        self._last_failure = ""

    def save(self, step: int, pieces: Sequence[Piece], state: Mapping[str, Any]) -> Path:
        """Write a complete checkpoint and wait for it; returns its folder.

        Raises CheckpointError, the same on every rank, if any rank could not do its part; then what was there
        before is still there.
        """
        self.begin(step, pieces, state)
        self.finish(must_hold=True)
        return self.folder / folder_name(step)

    def begin(self, step: int, pieces: Sequence[Piece], state: Mapping[str, Any]) -> None:
        """Start a save, after the one before has ended.

        `pieces` are this rank's share, left alone until the save has ended. `state` is of JSON's values and
        equal on all ranks (rank 0's is taken); "ephemeral" and "metrics" in it decide how long it is kept.
        """
        self.finish()
        target = self.folder / folder_name(step)
        temporary = self.folder / f"{target.name}.{self.attempt:05d}.tmp"
        self._saving = _Saving(step, state, temporary, target)
        self._saving.writing = Background(lambda: self._write(temporary, pieces), f"save {target.name}")

    @property
    def saving(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._saving is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still at work on the present part of a save."""
        work = None if self._saving is None else self._saving.work
        return work is not None and not work.done

    def advance(self) -> None:
        """Agree on the outcome of a part that no rank is busy with any more, and go on to the next."""
        if self._saving is None:
            return
        if self._saving.committed:
            self._agree_on_commit(self._saving)
        else:
            self._agree_on_files(self._saving)

    def finish(self, *, must_hold: bool = False) -> None:
        """Wait for the save that is under way, if there is one. With `must_hold` its failure raises."""
        failed_before = self.failed_saves
        while self._saving is not None:
            if (work := self._saving.work) is not None:
                work.wait()
            self.advance()
        if must_hold and self.failed_saves > failed_before:
            raise CheckpointError(self._last_failure)

    def newest(self) -> Path | None:
        """The newest complete checkpoint whose files are whole, or None if there never was a complete one.

        A damaged one is logged and passed over. Raises CheckpointError if all are damaged, since starting
        from nothing is then for the user to decide.
        """
        collectives.from_main_rank(lambda: folders.settle(self.folder))
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

    def _write(self, temporary: Path, pieces: Sequence[Piece]) -> FileRecord:
        temporary.mkdir(parents=True, exist_ok=True)
        path = temporary / f"rank_{self.rank:05d}.safetensors"
        part = write_pieces(path, self.rank, pieces)
        return manifests.write_part(path.with_suffix(".json"), part)

    def _agree_on_files(self, saving: _Saving) -> None:
        work = saving.writing
        assert work is not None
        failure = None if work.error is None else f"rank {self.rank} could not write its file: {work.error!r}"
        mine = _Report(self.rank, failure, work.value if work.error is None else None)
        reports = collectives.gather_lists([mine])
        if failures := [report.failure for report in reports if report.failure is not None]:
            self._fail(saving, failures)
            return
        saving.committed = True
        if self.rank == 0:
            described = [report.described for report in reports if report.described is not None]
            saving.committing = Background(
                lambda: self._commit(saving, described), f"commit {saving.target.name}"
            )

    def _agree_on_commit(self, saving: _Saving) -> None:
        work = saving.committing
        outcome: tuple[str | None, bool] = (None, False)
        if work is not None and work.error is not None:
            # What ldmscale raises on purpose says all there is; of other errors the kind matters too.
            final = isinstance(work.error, LdmscaleError) and not isinstance(work.error, CheckpointError)
            outcome = (f"rank 0 could not commit: {work.error!r}", final)
        failure, final = collectives.broadcast_object(outcome)
        if failure is not None:
            self._fail(saving, [failure], final=final)
            return
        self._saving, self.failed_saves = None, 0
        self.last_seconds = time.perf_counter() - saving.began
        log.info("saved step %d in %.1f s", saving.step, self.last_seconds)

    def _fail(self, saving: _Saving, failures: Sequence[str], *, final: bool = False) -> None:
        self._saving = None
        self.failed_saves += 1
        self._last_failure = (
            f"no checkpoint of step {saving.step} was written to {self.folder}; older ones are as they were. "
            + "; ".join(failures)
        )
        if self.rank == 0:
            shutil.rmtree(saving.temporary, ignore_errors=True)
        if self.failed_saves > 1:
            self._last_failure += f" ({self.failed_saves} saves have failed in a row)"
        if final or self.failed_saves > self.max_failed_saves:
            raise CheckpointError(self._last_failure)
        log.error("%s; the run goes on without it", self._last_failure)

    def _commit(self, saving: _Saving, described: Sequence[FileRecord]) -> None:
        temporary, target, step = saving.temporary, saving.target, saving.step
        parts = [_visible_part(temporary, record) for record in described]
        whole = manifests.merge(parts, step=step, state=saving.state)
        listed = {part.file.name for part in parts}
        for path in temporary.iterdir():
            if path.name not in listed:  # the descriptions, and files of a larger number of ranks before
                path.unlink()
        manifests.write_manifest(temporary, whole)
        sync(temporary)
        if self._fence is not None:
            self._fence()
        for later in complete_checkpoints(self.folder):
            if (step_of(later) or 0) > step:
                log.warning("checkpoint %s is of a later step than %d: set aside", later.name, step)
                folders.set_aside(later, ".abandoned")
        if target.exists():
            folders.set_aside(target, ".replaced")
        os.replace(temporary, target)
        mark_complete(target)
        sync(self.folder)
        write_text(self.folder / LATEST, target.name + "\n")
        self._known[target.name] = self._kept(step, whole.state)
        self._prune(step)

    def _prune(self, step: int) -> None:
        complete = complete_checkpoints(self.folder)
        stay = folders.staying([self._facts(path) for path in complete], self.retention)
        useless = [path for path in complete if step_of(path) not in stay]
        folders.remove_all([*useless, *folders.passed(self.folder, step)])

    def _facts(self, folder: Path) -> Kept:
        if folder.name not in self._known:
            step = step_of(folder)
            assert step is not None
            try:
                self._known[folder.name] = self._kept(step, manifests.read_manifest(folder).state)
            except CheckpointError:
                self._known[folder.name] = Kept(step)
        return self._known[folder.name]

    def _kept(self, step: int, state: Mapping[str, Any]) -> Kept:
        score = state.get("metrics", {}).get(self.retention.best_metric)
        return Kept(step, bool(state.get("ephemeral", False)), None if score is None else float(score))


def _visible_part(folder: Path, described: FileRecord) -> manifests.Part:
    """What a rank wrote, once this node sees it as that rank reported it.

    On a network file system another node's files may appear late. Raises CheckpointError if they never do.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:
            part = manifests.read_part(folder / described.name, described)
            found = (folder / part.file.name).stat().st_size
            if found == part.file.size:
                return part
            fault = f"{part.file.name} has {found} bytes, its rank wrote {part.file.size}"
        except (CheckpointError, OSError) as error:
            fault = str(error)
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"rank 0 does not see what another rank wrote ({fault}): is {folder.parent} on a file system "
                "that all nodes share?"
            )
        time.sleep(0.2)
