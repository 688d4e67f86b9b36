"""A rank that is slower than the others is told by rank and host; one slow interval is no reason."""

import torch

from ldmscale.distributed.environment import Ranks
from ldmscale.train.straggler import RankTiming, StragglerDetector


def timings(slow: float, rank: int = 2) -> list[RankTiming]:
    return [RankTiming(n, f"host{n}", slow if n == rank else 1.0, 0.5 if n == 1 else 0.1) for n in range(4)]


def test_a_rank_that_stays_slow_is_told_once_with_its_host(caplog):
    detector = StragglerDetector(Ranks(size=4, local_size=4), torch.device("cpu"))
    for _ in range(5):
        found = detector.judge(timings(2.0))
    assert found["time/slowest_rank"] == 2 and found["time/slowest_rank_rate_share"] == 0.5
    assert found["time/longest_data_wait_rank"] == 1 and found["time/longest_data_wait_share"] == 0.5
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("rank 2 on host2 computes at 50% of the median rate")


def test_slow_intervals_that_are_not_in_a_row_are_no_reason(caplog):
    detector = StragglerDetector(Ranks(size=4, local_size=4), torch.device("cpu"))
    for slow in (2.0, 2.0, 1.0, 2.0, 2.0, 1.2):
        detector.judge(timings(slow))
    assert not caplog.records


def test_a_rank_alone_measures_nothing_and_several_measure_something():
    assert StragglerDetector(Ranks(), torch.device("cpu")).compare(0.0) == {}
    assert StragglerDetector(Ranks(size=2, local_size=2), torch.device("cpu"))._probe() > 0.0
