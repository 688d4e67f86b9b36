"""Finding the checkpoint that a run goes on from: on the disk, and where that fails in the store."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldmscale.checkpoint import folders
from ldmscale.checkpoint.folders import complete_checkpoints, folder_name, step_of
from ldmscale.checkpoint.remote import RemoteCheckpoints
from ldmscale.checkpoint.shards import Reader
from ldmscale.distributed import collectives
from ldmscale.errors import CheckpointError, StoppedEarlyError
from ldmscale.storage.atomic import move
from ldmscale.waiting import stoppable

log = logging.getLogger(__name__)


class Search:
    """One look for the newest checkpoint, by all ranks together."""

    def __init__(
        self, folder: Path, remote: RemoteCheckpoints | None, rank: int, world_size: int, attempt: int
    ) -> None:
        self._folder, self._remote = folder, remote
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self.stored: list[str] = []  # names of those in the store, oldest first

    def newest(self, accept: Callable[[Mapping[str, Any]], bool] | None = None) -> Path | None:
        """See `CheckpointManager.newest`."""
        collectives.from_main_rank(lambda: folders.settle(self._folder))
        here = collectives.broadcast_object([path.name for path in complete_checkpoints(self._folder)])
        self.stored = self._stored()
        faults: list[str] = []
        # What lies on the disk is of the course that the run took; the store may have later ones of another.
        for name in [*reversed(here), *(name for name in reversed(self.stored) if name not in here)]:
            fault = self._faults(self._folder / name) if name in here else [f"{name} is not on this disk"]
            if fault and name in self.stored:
                assert self._remote is not None
                log.warning("%s: fetching it from %s", "; ".join(fault), self._remote.url)
                fault = self._fetched(name, self._remote)
            if not fault and accept is not None and not accept(Reader(self._folder / name).state):
                continue
            if not fault:
                return self._folder / name
            faults += fault
            log.warning("checkpoint %s cannot be used, looking at the one before: %s", name, "; ".join(fault))
        if faults:
            raise CheckpointError(
                f"every complete checkpoint in {self._folder} is damaged; move it away to start anew:\n"
                + "\n".join(faults)
            )
        return None

    def _stored(self) -> list[str]:
        """Checkpoints in the store, oldest first. One that does not answer counts as empty, which is told."""
        remote = self._remote

        def names() -> list[str]:
            if remote is None:
                return []
            try:
                with stoppable():
                    return [folder_name(step) for step in remote.steps()]
            except StoppedEarlyError:
                raise
            except Exception as error:  # each store's library has its own
                log.error("%s cannot be read (%s): only the disk is looked at", remote.url, error)
                return []

        return collectives.from_main_rank(names)

    def _faults(self, folder: Path) -> list[str]:
        """Faults that any rank finds; the hashes of the files are shared out among the ranks."""
        try:
            found = Reader(folder).wrong_hashes(self._rank, self._world_size)
        except (CheckpointError, OSError) as error:
            found = [str(error)]
        return list(dict.fromkeys(collectives.gather_lists(found)))

    def _fetched(self, name: str, remote: RemoteCheckpoints) -> list[str]:
        """Bring a checkpoint from the store to the disk, each rank a share of its files; faults of any rank."""
        target = self._folder / name
        temporary = self._folder / f"{name}.{self._attempt:05d}.tmp"
        fault: list[str] = []
        stopped: list[str] = []
        try:
            step = step_of(target)
            assert step is not None
            temporary.mkdir(parents=True, exist_ok=True)
            with stoppable():
                if self._rank == 0:
                    remote.get_small(step, temporary)
                for file in remote.manifest(step).files[self._rank :: self._world_size]:
                    remote.get(step, file.name, file.size, temporary)
        except StoppedEarlyError as error:  # no fault of this checkpoint: none before it takes its place
            stopped = [str(error)]
        except Exception as error:  # each store's library has its own
            fault = [f"{name} cannot be fetched: {error!r}"]
        if reasons := collectives.gather_lists(stopped):
            raise StoppedEarlyError(reasons[0])
        if found := collectives.gather_lists(fault):
            return found

        def place() -> None:
            shutil.rmtree(target, ignore_errors=True)
            move(temporary, target)

        collectives.from_main_rank(place)
        return self._faults(target)
