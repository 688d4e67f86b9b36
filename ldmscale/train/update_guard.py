"""Skips updates with a non-finite loss or gradient, or (optionally) a loss spike.

All ranks skip such an update together and record the samples of its step. After several skips in a row the trainer
rolls back to a checkpoint and continues after the samples that led there. The state that decides this is the same on
all ranks and part of every checkpoint, so a resumed run decides like an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists, sum_over_ranks
from ldmscale.errors import LdmscaleError
from ldmscale.storage.lost_lines import LostLines, append_whole

log = logging.getLogger(__name__)


class SafetyOptions(Protocol):
    """The `safety` section of the configuration, as far as the guard reads it."""

    @property
    def skips_before_rollback(self) -> int: ...
    @property
    def max_rollbacks(self) -> int: ...
    @property
    def spike(self) -> Literal["off", "log", "skip"]: ...
    @property
    def spike_window(self) -> int: ...
    @property
    def spike_threshold(self) -> float: ...


class SpikeDetector:
    """Losses of the last steps. Detects outliers by median and median absolute deviation, which a spike cannot move."""

    def __init__(self, window: int, threshold: float) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.threshold = threshold

    def deviation(self, loss: float) -> float:
        """How far a loss is above the median, in standard deviations; 0 while less than half the window is filled."""
        if len(self.losses) < self.losses.maxlen // 2 if self.losses.maxlen else True:
            return 0.0
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(value - median) for value in self.losses)
        return (loss - median) / max(spread, 1e-12 * abs(median), 1e-30)


class Guard:
    """Watches the steps of one run. All ranks call every method together."""

    def __init__(self, options: SafetyOptions, file: Path) -> None:
        """`file`: receives one JSON line per skipped step and per rollback, from rank 0."""
        self.options, self.file, self.lost = options, file, LostLines(file)
        self.detector = SpikeDetector(options.spike_window, options.spike_threshold)
        self.skipped_in_a_row = 0
        self.rollbacks = 0  # since the run last exceeded `furthest_step`
        self.furthest_step = 0
        self._micro_batches: list[tuple[list[str], Tensor]] = []  # of this step on this rank: keys, loss
        self._loss = math.nan
        self._spike = ""

    def record(self, keys: Sequence[str], loss: Tensor) -> None:
        """Add a micro-batch of the current step. Does not wait for the device."""
        self._micro_batches.append((list(keys), loss.detach()))

    def should_skip(self, step: int) -> bool:
        """Whether to discard the update of this step for its loss. Call it after the last backward of the step."""
        if self.options.spike == "off":
            return False
        mine = sum(float(loss) for _, loss in self._micro_batches)
        size = dist.get_world_size() if dist.is_initialized() else 1
        self._loss = sum_over_ranks(mine) / (len(self._micro_batches) * size)
        if not math.isfinite(self._loss):
            return False  # such an update is skipped anyway
        deviation = self.detector.deviation(self._loss)
        if deviation <= self.options.spike_threshold:
            return False
        self._spike = f"its loss {self._loss:.4g} is {deviation:.1f} standard deviations above the median"
        if self.options.spike == "log":
            log.warning("step %d: %s of the %d before", step + 1, self._spike, len(self.detector.losses))
            self._spike = ""
            return False
        return True

    def on_update(self, step: int) -> None:
        """The update of a step was applied; `step` is the number of finished steps."""
        if self.options.spike != "off" and math.isfinite(self._loss):
            self.detector.losses.append(self._loss)
        self.skipped_in_a_row = 0
        if step > self.furthest_step:
            self.furthest_step, self.rollbacks = step, 0
        self._begin_step()

    def on_skip(self, step: int, positions: range, networks: Sequence[str]) -> None:
        """The update of these networks was skipped: record the samples of the step."""
        self.skipped_in_a_row += 1
        reason = self._spike or f"loss or gradient of {', '.join(networks)} is not finite"
        rank = dist.get_rank() if dist.is_initialized() else 0
        found = gather_lists(
            [{"rank": rank, "loss": _json(loss), "keys": keys} for keys, loss in self._micro_batches]
        )
        log.warning(
            "step %d was skipped on all ranks: %s (%d in a row); %s names its samples",
            step,
            reason,
            self.skipped_in_a_row,
            self.file.name,
        )
        self._write(
            {
                "step": step,
                "positions": [positions.start, positions.stop],
                "reason": reason,
                "micro_batches": found,
            }
        )
        self._begin_step()

    @property
    def must_roll_back(self) -> bool:
        """Whether too many updates in a row were skipped."""
        limit = self.options.skips_before_rollback
        return 0 < limit <= self.skipped_in_a_row

    def on_rollback(self, before: Mapping[str, Any], step: int, positions: range) -> None:
        """The run was restored to `step` and leaves these positions out; `before` is the state before the rollback."""
        self.skipped_in_a_row, self.rollbacks = 0, before["rollbacks"] + 1
        self.furthest_step = max(self.furthest_step, before["furthest_step"])
        log.warning(
            "back at step %d, on behind the samples %d to %d (return %d)",
            step,
            positions.start,
            positions.stop - 1,
            self.rollbacks,
        )
        self._write({"back_to_step": step, "left_out": [positions.start, positions.stop]})

    def check_rollback_limit(self, step: int) -> None:
        """Raises LdmscaleError after `max_rollbacks` rollbacks without progress."""
        if self.rollbacks >= self.options.max_rollbacks:
            raise LdmscaleError(
                f"step {step}: {self.skipped_in_a_row} updates in a row were skipped, as after each of the last "
                f"{self.rollbacks} returns to a checkpoint; {self.file} names the samples. Look at them and at the "
                "losses before, lower optim.lr or optim.gradient_clip_norm, or raise safety.spike_threshold; "
                "safety.max_rollbacks allows more returns"
            )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON values."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
            "furthest_step": self.furthest_step,
            "losses": list(self.detector.losses),
        }

    @staticmethod
    def is_clean(state: Mapping[str, Any]) -> bool:
        """Whether no update had just been skipped when a checkpoint of this state was written."""
        return not state.get("safety", {}).get("skipped_in_a_row", 0)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; all zero for a checkpoint without it."""
        self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
        self.rollbacks = int(state.get("rollbacks", 0))
        self.furthest_step = int(state.get("furthest_step", 0))
        self.detector.losses.clear()
        self.detector.losses.extend(state.get("losses", ()))
        self._begin_step()

    def _begin_step(self) -> None:
        self._micro_batches, self._loss, self._spike = [], math.nan, ""

    def _write(self, line: Mapping[str, Any]) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        try:
            with open(self.file, "ab", buffering=0) as file:
                append_whole(file.fileno(), (json.dumps(line) + "\n").encode())
        except OSError as error:
            self.lost.add(error)


def _json(loss: Tensor) -> float | str:
    value = float(loss)
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
