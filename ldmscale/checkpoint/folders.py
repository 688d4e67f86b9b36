"""The folders of a run's checkpoints: their names, which of them count, which may go.

    checkpoints/step_00001000/              complete, once it has the file COMPLETE
    checkpoints/step_00001000.00003.tmp/    being written by the third start of the run
    checkpoints/step_00001000.replaced/     former content of a step that is being saved again
    checkpoints/step_00001000.abandoned/    of a later step than one saved since: the run went back
    checkpoints/step_00001000.unfinished/   a commit that never came to its end

Only complete ones are ever read. The others go when the run has passed them.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ldmscale.checkpoint.shards import COMPLETE
from ldmscale.storage.atomic import move

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_([0-9]{8,18})")  # more digits are no step, and int refuses some thousands of them


class RetentionOptions(Protocol):
    """Which complete checkpoints stay, as in the `checkpoint` section of the configuration. The newest two always do."""

    @property
    def keep_last(self) -> int: ...
    @property
    def keep_every_steps(self) -> int: ...
    @property
    def keep_best(self) -> int: ...
    @property
    def best_metric(self) -> str | None: ...
    @property
    def best_is(self) -> Literal["lowest", "highest"]: ...


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay where no section of a configuration says so."""

    keep_last: int = 2  # of those that are not ephemeral
    keep_every_steps: int = 0  # these stay for ever; 0: none
    keep_best: int = 0  # by `best_metric`
    best_metric: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"


@dataclass(frozen=True)
class Kept:
    """A complete checkpoint, as far as it matters for its staying."""

    step: int
    ephemeral: bool = False  # there to lose little at a failure, of no interest once there is a newer one
    score: float | None = None  # value of the metric that makes the best


def staying(found: Collection[Kept], retention: RetentionOptions) -> set[int]:
    """Steps of the checkpoints that stay."""
    newest = sorted(found, key=lambda kept: -kept.step)
    stay = {kept.step for kept in newest[:2]}
    stay |= {kept.step for kept in [kept for kept in newest if not kept.ephemeral][: retention.keep_last]}
    if retention.keep_every_steps:
        stay |= {kept.step for kept in found if kept.step % retention.keep_every_steps == 0}
    if retention.keep_best:
        sign = 1.0 if retention.best_is == "lowest" else -1.0
        scored = [kept for kept in newest if kept.score is not None and kept.score == kept.score]
        scored.sort(key=lambda kept: sign * (kept.score or 0.0))
        stay |= {kept.step for kept in scored[: retention.keep_best]}
    return stay


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; None for other folders, and for those that do not count."""
    found = _STEP.fullmatch(folder.name)
    return None if found is None else int(found.group(1))


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Folders of complete checkpoints, oldest step first. Damage is not looked for."""
    found = [(step_of(path.parent), path.parent) for path in Path(folder).glob(f"step_*/{COMPLETE}")]
    return [path for step, path in sorted((step, path) for step, path in found if step is not None)]


def settle(folder: Path) -> None:
    """Bring what earlier starts of the run left behind to an end, before the newest is looked for.

    A stale process of an earlier start can then finish no checkpoint any more: the folder that it would
    rename, or put COMPLETE into, is gone.
    """
    for old in folder.glob("step_*.replaced"):
        _put_back(old)
    for path in folder.glob("step_*"):
        if path.name.endswith(".tmp"):
            remove(path)
        elif step_of(path) is not None and path.is_dir() and not (path / COMPLETE).is_file():
            set_aside(path, ".unfinished")


def _put_back(old: Path) -> None:
    """Undo a save of an existing step that ended between its two renamings."""
    target = old.with_suffix("")
    if (old / COMPLETE).is_file() and not (target / COMPLETE).is_file():
        log.warning("a save of %s was cut off: its former content is put back", target.name)
        shutil.rmtree(target, ignore_errors=True)
        move(old, target)


def undo(target: Path) -> None:
    """After a commit that failed: nothing is left of it, and what it replaced is back."""
    try:
        if target.is_dir() and not (target / COMPLETE).is_file():
            shutil.rmtree(target)
        if (old := target.with_name(target.name + ".replaced")).is_dir():
            _put_back(old)
    except OSError as error:
        log.warning("what is left of %s cannot be cleared: %s", target, error)


def set_aside(folder: Path, ending: str) -> None:
    aside = folder.with_name(folder.name + ending)
    shutil.rmtree(aside, ignore_errors=True)
    move(folder, aside)


def passed(folder: Path, step: int) -> list[Path]:
    """Folders beside complete checkpoints that nobody needs any more once `step` is saved."""
    found = []
    for path in folder.glob("step_*"):
        number = _STEP.match(path.name)
        if number is None or not path.is_dir():
            continue
        ending = path.name[number.end() :]
        behind = int(number.group(1)) <= step
        unfinished = not ending and not (path / COMPLETE).is_file() and behind
        if (
            unfinished
            or ending == ".replaced"
            or ending.endswith(".tmp")
            or (ending in (".abandoned", ".unfinished") and behind)
        ):
            found.append(path)
    return found


def remove(folder: Path) -> None:
    """Remove a checkpoint's folder. Failing to is no reason to stop a run."""
    try:
        # First, so that half a folder is never taken for whole.
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("cannot remove the old checkpoint %s: %s", folder, error)


def remove_all(folders: Sequence[Path]) -> None:
    for folder in folders:
        remove(folder)
