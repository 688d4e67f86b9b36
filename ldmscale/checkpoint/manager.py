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
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ldmscale.checkpoint import folders
from ldmscale.checkpoint import manifest as manifests
from ldmscale.checkpoint.folders import (
    Kept,
    Retention,
    RetentionOptions,
    complete_checkpoints,
    folder_name,
    step_of,
)
from ldmscale.checkpoint.remote import RemoteCheckpoints
from ldmscale.checkpoint.search import Search
from ldmscale.checkpoint.shards import Piece, Reader, mark_complete, write_pieces
from ldmscale.checkpoint.two_phase import Outcome, TwoParts
from ldmscale.distributed import collectives
from ldmscale.errors import CheckpointError, DataError
from ldmscale.storage.atomic import move, sync, write_text
from ldmscale.storage.digest import FileRecord
from ldmscale.storage.object_store import Storage
from ldmscale.waiting import Wait, WaitTimeoutError

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
class _Saving:
    """The save that is under way."""

    step: int
    temporary: Path
    work: TwoParts[FileRecord]
    began: float


class CheckpointManager:
    """The checkpoints of one run. All ranks call `begin`, `advance`, `finish`, `save` and `newest` together.

    Between two steps the trainer calls `advance` with what is `busy` on any rank. A save that fails leaves older
    checkpoints as they were and is told loudly; more than `max_failed_saves` in a row, or one that
    `finish(must_hold=True)` waits for, raise CheckpointError on every rank.

    `attempt` numbers the starts of the run, and `fence` raises on every rank once another start has taken the run
    over: a process that came back from the dead publishes nothing. One that was stopped just behind its look may
    leave a folder NAME.ATTEMPT.tmp, which nobody reads and the next save removes.

    With `url` every complete checkpoint is copied there, at most one at a time; a newer one that is complete
    by then goes next. A failed upload is told and never stops a run, unless a later start has claimed the URL. `beside`
    names files and folders next to `folder` that go there too, as they are then. `storage` has the options, time limits and
    retries of the store.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        retention: RetentionOptions | None = None,
        max_failed_saves: int = 0,
        attempt: int = 0,
        fence: Callable[[], None] | None = None,
        url: str | None = None,
        beside: Sequence[str] = (),
        storage: Storage | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.retention: RetentionOptions = retention or Retention()
        self.max_failed_saves, self.attempt = max_failed_saves, attempt
        self.failed_saves = 0  # in a row
        self.last_seconds = 0.0  # from the copy of the last save to its end
        self._fence = fence or (lambda: None)
        self._beside = beside
        self.remote = None if url is None else RemoteCheckpoints(url, storage)
        self._upload: tuple[int, TwoParts[None]] | None = None
        self._next_upload: int | None = None
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
        work = TwoParts(
            self.rank,
            lambda: self._write(temporary, pieces),
            lambda described: self._commit(temporary, target, step, state, described),
            ("write its file", "commit"),
        )
        self._saving = _Saving(step, temporary, work, time.perf_counter())

    @property
    def saving(self) -> int | None:
        """The step of the save that is under way, the same on all ranks."""
        return None if self._saving is None else self._saving.step

    @property
    def busy(self) -> tuple[bool, bool]:
        """Whether this rank is at work on the present part of a save, and of an upload."""
        return (
            self._saving is not None and self._saving.work.busy,
            self._upload is not None and self._upload[1].busy,
        )

    def advance(self, saving: bool = False, uploading: bool = False) -> None:
        """Agree on the outcome of parts that no rank is busy with any more, and go on to the next.

        The arguments: `busy`, of any rank.
        """
        upload = self._upload  # the end of a save begins one, which `uploading` does not tell of
        if self._saving is not None and not saving:
            outcome = self._saving.work.advance()
            if outcome is not None:
                self._end_of_save(self._saving, outcome)
        if upload is not None and not uploading:
            step, work = upload
            outcome = work.advance()
            if outcome is not None:
                self._end_of_upload(step, outcome)

    def finish(self, *, must_hold: bool = False, uploads: bool = False) -> None:
        """Wait for the save that is under way, if there is one, and for uploads if asked.

        With `must_hold` a failure of the save raises.
        """
        failed_before = self.failed_saves
        while self._saving is not None:
            self._saving.work.wait()
            self.advance(uploading=True)
        if must_hold and self.failed_saves > failed_before:
            raise CheckpointError(self._last_failure)
        while uploads and self._upload is not None:
            self._upload[1].wait()
            self.advance(saving=True)

    def _end_of_save(self, saving: _Saving, outcome: Outcome) -> None:
        self._saving = None
        if not outcome.failures:
            self.failed_saves = 0
            self.last_seconds = time.perf_counter() - saving.began
            log.info("saved %s/%s in %.1f s", self.folder.name, folder_name(saving.step), self.last_seconds)
            self.upload(saving.step)
            return
        self.failed_saves += 1
        self._last_failure = (
            f"no checkpoint of step {saving.step} was written to {self.folder}; older ones are as they were. "
            + "; ".join(outcome.failures)
        )
        if self.failed_saves > 1:
            self._last_failure += f" ({self.failed_saves} saves have failed in a row)"
        if self.rank == 0:
            shutil.rmtree(saving.temporary, ignore_errors=True)
            folders.undo(self.folder / folder_name(saving.step))
        if outcome.final or self.failed_saves > self.max_failed_saves:
            raise CheckpointError(self._last_failure)
        log.error("%s; the run goes on without it", self._last_failure)

    def upload(self, step: int) -> None:
        """Copy a complete checkpoint to the URL, if there is one, after the upload that is under way."""
        if self.remote is None:
            return
        if self._upload is not None:
            self._next_upload = step
            return
        remote, folder = self.remote, self.folder / folder_name(step)

        def withdraw() -> None:
            self._fence()
            remote.claim(str(self.folder.absolute().parent))
            remote.check_claim()
            remote.withdraw(step)

        def send() -> None:
            names = [file.name for file in manifests.read_manifest(folder).files]
            remote.put(folder, names[self.rank :: self.world_size])

        def publish(_: list[None]) -> None:
            self._fence()
            remote.check_claim()
            remote.put_beside(self.folder.parent, self._beside)
            remote.publish(folder)
            known = remote.steps()
            facts = [self._facts(self.folder / folder_name(old), remote) for old in known if old <= step]
            stay = folders.staying(facts, self.retention)
            for old in known:  # later ones are of a course that the run has left
                if old not in stay:
                    remote.remove(old)

        # A file of a checkpoint that counts must not be replaced: no rank sends before rank 0 has removed the manifest.
        work = TwoParts(
            self.rank,
            send,
            publish,
            ("upload its file", "publish the upload"),
            before=(withdraw, "begin the upload"),
        )
        self._upload = step, work

    def _end_of_upload(self, step: int, outcome: Outcome) -> None:
        assert self.remote is not None
        self._upload = None
        if outcome.failures:
            told = "; ".join(outcome.failures)
            log.error("step %d is not in %s, only in %s: %s", step, self.remote.url, self.folder, told)
            if outcome.final:
                raise CheckpointError(told)
        else:
            log.info("uploaded step %d to %s", step, self.remote.url)
        if self._next_upload is not None:
            step, self._next_upload = self._next_upload, None
            self.upload(step)

    def newest(self, accept: Callable[[Mapping[str, Any]], bool] | None = None) -> Path | None:
        """The newest complete checkpoint whose files are whole, or None if there never was a complete one.

        With `accept` those whose state it refuses are passed over. A damaged one is logged and passed over; one that
        the store still has is fetched from there. Raises CheckpointError if all are damaged, since starting from
        nothing is then for the user to decide.
        """
        if self.remote is not None and self.rank == 0:
            try:
                self.remote.claim(str(self.folder.absolute().parent))
            except Exception as error:  # each store's library has its own
                # It is tried again at the first upload.
                log.error("%s cannot be claimed for this start (%r)", self.remote.url, error)
        search = Search(self.folder, self.remote, self.rank, self.world_size, self.attempt)
        found = search.newest(accept)
        if found is not None and found.name not in search.stored:
            self.upload(step_of(found) or 0)  # the start before was stopped before it had done so
        return found

    def settle(self) -> None:
        """Bring to an end what earlier starts left behind, where the newest is not looked for."""
        collectives.from_main_rank(lambda: folders.settle(self.folder))

    def _write(self, temporary: Path, pieces: Sequence[Piece]) -> FileRecord:
        self._fence()
        temporary.mkdir(parents=True, exist_ok=True)
        path = temporary / f"rank_{self.rank:05d}.safetensors"
        part = write_pieces(path, self.rank, pieces)
        return manifests.write_part(path.with_suffix(".json"), part)

    def _commit(
        self,
        temporary: Path,
        target: Path,
        step: int,
        state: Mapping[str, Any],
        described: Sequence[FileRecord],
    ) -> None:
        parts = [_visible_part(temporary, record) for record in described]
        whole = manifests.merge(parts, step=step, state=state)
        listed = {part.file.name for part in parts}
        for path in temporary.iterdir():
            if path.name not in listed:  # the descriptions, and files of a larger number of ranks before
                path.unlink()
        manifests.write_manifest(temporary, whole)
        sync(temporary)
        self._fence()
        for later in complete_checkpoints(self.folder):
            if (step_of(later) or 0) > step:
                log.warning("checkpoint %s is of a later step than %d: set aside", later.name, step)
                folders.set_aside(later, ".abandoned")
        if target.exists():
            folders.set_aside(target, ".replaced")
        move(temporary, target)
        mark_complete(target)
        sync(self.folder)
        # It counts from here on: what follows is for people, and for space.
        self._known[target.name] = self._kept(step, whole.state)
        self._prune(step)
        try:
            write_text(self.folder / LATEST, target.name + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder / LATEST, error)

    def _prune(self, step: int) -> None:
        complete = complete_checkpoints(self.folder)
        stay = folders.staying([self._facts(path) for path in complete], self.retention)
        if (uploading := self._upload) is not None:
            stay.add(uploading[0])
        useless = [path for path in complete if step_of(path) not in stay]
        folders.remove_all([*useless, *folders.passed(self.folder, step)])

    def _facts(self, folder: Path, remote: RemoteCheckpoints | None = None) -> Kept:
        if folder.name not in self._known:
            step = step_of(folder)
            assert step is not None
            try:
                found = manifests.read_manifest(folder) if remote is None else remote.manifest(step)
                self._known[folder.name] = self._kept(step, found.state)
            except (CheckpointError, DataError, OSError, ValueError, TypeError, AttributeError):
                self._known[folder.name] = Kept(step)
        return self._known[folder.name]

    def _kept(self, step: int, state: Mapping[str, Any]) -> Kept:
        score = state.get("metrics", {}).get(self.retention.best_metric)
        return Kept(step, bool(state.get("ephemeral", False)), None if score is None else float(score))


def _visible_part(folder: Path, described: FileRecord) -> manifests.Part:
    """What a rank wrote, once this node sees it as that rank reported it.

    On a network file system another node's files may appear late. Raises CheckpointError if they never do.
    """
    wait = Wait(
        f"the files of other ranks in {folder}", limit_seconds=_VISIBLE_SECONDS, obeys_stop=False
    )  # a save
    while True:
        try:
            part = manifests.read_part(folder / described.name, described)
            found = (folder / part.file.name).stat().st_size
            if found == part.file.size:
                return part
            fault = f"{part.file.name} has {found} bytes, its rank wrote {part.file.size}"
        except (CheckpointError, OSError) as error:
            fault = str(error)
        try:
            wait.turn(0.2)
        except WaitTimeoutError:
            raise CheckpointError(
                f"rank 0 does not see what another rank wrote ({fault}): is {folder.parent} on a file system "
                "that all nodes share?"
            ) from None
