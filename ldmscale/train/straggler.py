"""Detects straggler ranks.

In synchronous training every rank's step time is the same, so at each log interval each rank times a small local matmul
instead, and compares how long it waited for its data. A throttled GPU, a busy host or a slow disk is then reported by
rank and host.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.environment import Ranks

log = logging.getLogger(__name__)

SLOW_SHARE = 0.7  # of the median rate
_REPEATS = 3
_IN_A_ROW = 3  # intervals after which a slow rank is reported


@dataclass(frozen=True)
class RankTiming:
    """What one rank measured in one log interval."""

    rank: int
    host: str
    seconds: float  # per matmul
    data_wait_share: float


class StragglerDetector:
    """Compares the ranks. With one rank it measures nothing."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._slow: dict[int, int] = {}  # rank: intervals in a row
        if ranks.size > 1:
            # On a GPU over a millisecond, far more than a synchronisation; random, since ones draw less power.
            size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (192, torch.float32)
            generator = torch.Generator(device).manual_seed(0)  # the training's own draws stay as they are
            self._a = torch.rand(size, size, device=device, dtype=dtype, generator=generator)

    def compare(self, data_wait_share: float) -> dict[str, float]:
        """Metrics of this interval: the slowest rank, its rate as a share of the median, and the rank that waited most for
        data. Collective.
        """
        if self._ranks.size == 1:
            return {}
        mine = RankTiming(self._ranks.rank, socket.gethostname(), self._probe(), data_wait_share)
        return self.judge(gather_lists([mine]))

    def judge(self, timings: Sequence[RankTiming]) -> dict[str, float]:
        """As `compare`, from the timings of all ranks. Logs a rank that was slow several times in a row, once."""
        median = statistics.median(timing.seconds for timing in timings)
        for timing in timings:
            share = median / timing.seconds
            self._slow[timing.rank] = self._slow.get(timing.rank, 0) + 1 if share < SLOW_SHARE else 0
            if self._slow[timing.rank] == _IN_A_ROW and self._ranks.is_main:
                log.warning(
                    "rank %d on %s computes at %.0f%% of the median rate, %d log intervals in a row: all ranks wait for it",
                    timing.rank,
                    timing.host,
                    100 * share,
                    _IN_A_ROW,
                )
        slowest = max(timings, key=lambda timing: timing.seconds)
        waiting = max(timings, key=lambda timing: timing.data_wait_share)
        return {
            "time/slowest_rank": slowest.rank,
            "time/slowest_rank_rate_share": median / slowest.seconds,
            "time/longest_data_wait_rank": waiting.rank,
            "time/longest_data_wait_share": waiting.data_wait_share,
        }

    def _probe(self) -> float:
        times = []
        for _ in range(_REPEATS):
            _wait(self._device)
            began = time.perf_counter()
            torch.mm(self._a, self._a)
            _wait(self._device)
            times.append(time.perf_counter() - began)
        return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
