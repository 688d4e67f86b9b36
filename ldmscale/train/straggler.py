"""Which rank is slow: every rank of a synchronous training takes the same time for a step, however long it worked itself.

So at each log interval every rank times a small piece of arithmetic that waits for nobody, and how long it waited for its
data. A GPU that throttles, a host that something else uses, a disk that limps then stand out by rank and host.
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
_IN_A_ROW = 3  # intervals after which a slow rank is told


@dataclass(frozen=True)
class Pace:
    """What one rank found in one interval."""

    rank: int
    host: str
    seconds: float  # for the piece of arithmetic
    data_wait_share: float


class Pacer:
    """Compares the ranks. Alone it measures nothing."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._slow: dict[int, int] = {}  # rank: intervals in a row
        if ranks.size > 1:
            size, dtype = (2048, torch.bfloat16) if device.type == "cuda" else (192, torch.float32)
            self._a = torch.ones(size, size, device=device, dtype=dtype)

    def compare(self, data_wait_share: float) -> dict[str, float]:
        """Metrics of this interval: the slowest rank, its rate as a share of the median, and the rank that waited most for
        data. Collective.
        """
        if self._ranks.size == 1:
            return {}
        mine = Pace(self._ranks.rank, socket.gethostname(), self._probe(), data_wait_share)
        return self.judge(gather_lists([mine]))

    def judge(self, paces: Sequence[Pace]) -> dict[str, float]:
        """As `compare`, from what all ranks found; tells a rank that was slow several times in a row, once."""
        median = statistics.median(pace.seconds for pace in paces)
        for pace in paces:
            share = median / pace.seconds
            self._slow[pace.rank] = self._slow.get(pace.rank, 0) + 1 if share < SLOW_SHARE else 0
            if self._slow[pace.rank] == _IN_A_ROW and self._ranks.is_main:
                log.warning(
                    "rank %d on %s computes at %.0f%% of the median rate, %d log intervals in a row: all ranks wait for it",
                    pace.rank,
                    pace.host,
                    100 * share,
                    _IN_A_ROW,
                )
        slowest = max(paces, key=lambda pace: pace.seconds)
        waiting = max(paces, key=lambda pace: pace.data_wait_share)
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
