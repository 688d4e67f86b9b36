"""Updates that must not be: where a loss or gradient is not finite, or a loss far above those of before.

All ranks skip such an update together and the samples of its step are written down. After several in a row the
trainer goes back to a checkpoint, and on behind the samples that led there. Everything that decides this is the same
on all ranks and part of every checkpoint, so a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists, sum_over_ranks
from ldmscale.errors import LdmscaleError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SafetyOptions:
    """`config.SafetyConfig` tells their meaning."""

    skips_before_rollback: int = 0
    max_rollbacks: int = 3
    spike: str = "off"  # "off", "log", "skip"
    spike_window: int = 200
    spike_threshold: float = 10.0


class SpikeDetector:
    """Losses of the last steps, and whether one stands out: by median and median distance, which a spike cannot move."""

    def __init__(self, window: int, threshold: float) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.threshold = threshold

    def deviation(self, loss: float) -> float:
        """How far a loss is above the median, in standard deviations; 0 before there is enough to compare with."""
        if len(self.losses) < self.losses.maxlen // 2 if self.losses.maxlen else True:
            return 0.0
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(value - median) for value in self.losses)
        return (loss - median) / max(spread, 1e-12 * abs(median), 1e-30)


class Guard:
    """Watches the steps of one run. Every method is called by all ranks together."""

    def __init__(self, options: SafetyOptions, file: Path) -> None:
        """`file`: receives one JSON line for each skipped step and each return to a checkpoint, from rank 0."""
        self.options, self.file = options, file
        self.detector = SpikeDetector(options.spike_window, options.spike_threshold)
        self.skipped_in_a_row = 0
        self.rollbacks = 0  # since the run got further than ever before
        self.furthest_step = 0
        self._micro_batches: list[tuple[list[str], Tensor]] = []  # of this step on this rank: keys, loss
        self._loss = math.nan
        self._spike = ""

    def note(self, keys: Sequence[str], loss: Tensor) -> None:
        """Take down a micro-batch of the present step; nothing waits for the device here."""
        self._micro_batches.append((list(keys), loss.detach()))

    def spiking(self, step: int) -> bool:
        """Whether the update of this step is to be thrown away for its loss; asked when its last backward is done."""
        if self.options.spike == "off":
            return False
        mine = sum(float(loss) for _, loss in self._micro_batches)
        size = dist.get_world_size() if dist.is_initialized() else 1
        self._loss = sum_over_ranks(mine) / (len(self._micro_batches) * size)
        if not math.isfinite(self._loss):
            return False  # the update is skipped for that
        deviation = self.detector.deviation(self._loss)
        if deviation <= self.options.spike_threshold:
            return False
        self._spike = f"its loss {self._loss:.4g} is {deviation:.1f} standard deviations above the median"
        if self.options.spike == "log":
            log.warning("step %d: %s of the %d before", step + 1, self._spike, len(self.detector.losses))
            self._spike = ""
            return False
        return True

    def updated(self, step: int) -> None:
        """The step (the number of finished ones) made its update."""
        if self.options.spike != "off" and math.isfinite(self._loss):
            self.detector.losses.append(self._loss)
        self.skipped_in_a_row = 0
        if step > self.furthest_step:
            self.furthest_step, self.rollbacks = step, 0
        self._next()

    def skipped(self, step: int, positions: range, networks: Sequence[str]) -> None:
        """The step made no update of these networks: write down what it saw."""
        self.skipped_in_a_row += 1
        reason = self._spike or f"loss or gradient of {', '.join(networks)} is not finite"
        rank = dist.get_rank() if dist.is_initialized() else 0
        found = gather_lists(
            [{"rank": rank, "loss": _plain(loss), "keys": keys} for keys, loss in self._micro_batches]
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
        self._next()

    @property
    def must_go_back(self) -> bool:
        """Whether too many updates in a row were skipped."""
        limit = self.options.skips_before_rollback
        return 0 < limit <= self.skipped_in_a_row

    def went_back(self, before: Guard, step: int, positions: range) -> None:
        """The run stands at `step` again, after it had stood where `before` tells, and leaves these positions out."""
        self.skipped_in_a_row, self.rollbacks = 0, before.rollbacks + 1
        self.furthest_step = max(self.furthest_step, before.furthest_step)
        log.warning(
            "back at step %d, on behind the samples %d to %d (return %d)",
            step,
            positions.start,
            positions.stop - 1,
            self.rollbacks,
        )
        self._write({"back_to_step": step, "left_out": [positions.start, positions.stop]})

    def check_further_return(self, step: int) -> None:
        """Raises LdmscaleError where going back has not helped before."""
        if self.rollbacks >= self.options.max_rollbacks:
            raise LdmscaleError(
                f"step {step}: {self.skipped_in_a_row} updates in a row were skipped, as after each of the last "
                f"{self.rollbacks} returns to a checkpoint; {self.file} names the samples. Look at them and at the "
                "losses before, lower optim.lr or optim.gradient_clip_norm, or raise safety.spike_threshold; "
                "safety.max_rollbacks allows more returns"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON's values."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
            "furthest_step": self.furthest_step,
            "losses": list(self.detector.losses),
        }

    @staticmethod
    def was_calm(state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint of this state was written when no update had just been skipped."""
        return not state.get("safety", {}).get("skipped_in_a_row", 0)

    def restored(self, state: Mapping[str, Any]) -> Guard:
        """A guard as `state` describes it (all zero for a checkpoint that knows none)."""
        found = Guard(self.options, self.file)
        found.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
        found.rollbacks = int(state.get("rollbacks", 0))
        found.furthest_step = int(state.get("furthest_step", 0))
        found.detector.losses.extend(state.get("losses", ()))
        return found

    def _next(self) -> None:
        self._micro_batches, self._loss, self._spike = [], math.nan, ""

    def _write(self, line: Mapping[str, Any]) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _plain(loss: Tensor) -> float | str:
    value = float(loss)
    return value if math.isfinite(value) else str(value)  # JSON knows no nan
