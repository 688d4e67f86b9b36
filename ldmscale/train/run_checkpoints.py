"""What a run saves: checkpoints of the whole training state and, more often, its power-function averages alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.train.snapshot import HostCopies, snapshot, snapshot_averages
from ldmscale.train.stage import Stage


class RunCheckpoints:
    """Saves in the background. All ranks call every method together, at the same step.

    Args:
        states: the checkpoints that a run resumes from.
        averages: the stored states of the power-function averages.
        about: what the manifest of every checkpoint says about the run.
    """

    def __init__(
        self, *, states: CheckpointManager, averages: CheckpointManager, about: Mapping[str, Any]
    ) -> None:
        self.states, self.averages = states, averages
        self._about = about
        self._copies = HostCopies()

    def newest(self) -> Path | None:
        """The newest complete checkpoint; clears up what an earlier start of the run left unfinished."""
        newest = self.states.newest()
        self.averages.settle()
        return newest

    def newest_clean(self, clean: Callable[[Mapping[str, Any]], bool]) -> Path | None:
        """The newest checkpoint whose state is `clean`, else the newest of all. Waits for the saves under way first."""
        self.averages.finish()
        self.states.finish()
        return self.states.newest(clean) or self.states.newest()

    @property
    def busy(self) -> tuple[bool, bool, bool]:
        """Whether this rank is busy with a save, an upload, and a save of averages; see `advance`."""
        return (*self.states.busy, self.averages.busy[0])

    def advance(self, saving: bool, uploading: bool, storing: bool) -> None:
        """Continue what no rank is busy with any more. The arguments are `busy`, of any rank."""
        self.averages.advance(storing)
        # A complete checkpoint implies that all averages stored before it are complete, too.
        self.states.advance(saving or self.averages.saving is not None, uploading)

    def save(self, step: int, stage: Stage, state: Mapping[str, Any], *, inside_window: bool = False) -> None:
        """Start a checkpoint. Waits for the copy to host memory, and for the previous save if it still runs.

        `inside_window`: as `snapshot`.
        """
        if self.averages.saving != step:
            self.averages.finish()
        self.states.finish()  # the new copy goes to the memory that it is written from
        pieces, description = snapshot(
            stage.engines, stage.averages, self._copies, inside_window=inside_window
        )
        self.states.begin(step, pieces, {**description, **state, "run": self._about})

    def store_averages(self, step: int, stage: Stage, images_seen: int) -> None:
        """Start a save of the power-function averages alone."""
        pieces, description = snapshot_averages(stage.engines, stage.averages)
        self.averages.begin(step, pieces, description | {"images_seen": images_seen})

    def wait(self, *, uploads: bool = False) -> None:
        """Wait for the saves under way, and for uploads if asked. Raises CheckpointError if a save failed."""
        try:
            self.averages.finish(must_hold=True)
        finally:
            self.states.finish(must_hold=True, uploads=uploads)
