"""Who holds up the others: told from the beats of all ranks, by a thread that goes on while a rank waits."""

import time

from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.watchdog import Beat, Heartbeat, odd_ranks, read_beats, silent_hosts


def beat(rank: int, step: int = 7, phase: str = "step", age: float = 0.0, host: str = "a") -> Beat:
    return Beat(rank, host, 100 + rank, 1, step, phase, 3.0, age)


def test_a_rank_that_differs_is_named_with_its_host_and_phase():
    beats = [beat(0), beat(1), beat(2, phase="data", host="b"), beat(3)]
    told = odd_ranks(beats, 4, 1, 1.0)
    assert told == (
        "rank 2 on b (process 102) is in phase data after step 7, while the others are in phase step after step 7"
    )
    # Equally many in two places: those behind keep the others waiting.
    assert odd_ranks([beat(0, step=8), beat(1, step=7)], 2, 1, 1.0).startswith("rank 1 ")


def test_silent_ranks_come_before_all_else():
    beats = [beat(0, step=9), beat(1, age=60.0, host="b")]
    assert odd_ranks(beats, 2, 1, 1.0).startswith(
        "stopped, dead or cut off: rank 1 on b (process 101) (silent for 60 s"
    )
    assert silent_hosts(beats, 1.0) == ["b"]
    assert (
        silent_hosts([beat(0, age=60.0), beat(1, age=60.0, host="b")], 1.0) == []
    )  # nobody is left to accuse them


def test_ranks_of_earlier_attempts_do_not_count():
    assert odd_ranks([beat(0), beat(1)], 3, 1, 1.0) == "never heard of in this attempt: rank 2"
    assert odd_ranks([beat(0), beat(1)], 2, 2, 1.0) == "never heard of in this attempt: ranks 0, 1"


def test_all_ranks_in_one_place_accuse_none():
    assert odd_ranks([beat(0), beat(1)], 2, 1, 1.0).startswith("all 2 ranks are in phase step after step 7")


def _heartbeat(folder, rank, told, first=0.0, later=0.0):
    return Heartbeat(
        folder,
        Ranks(rank=rank, size=2, local_rank=rank, local_size=2),
        attempt=1,
        every_seconds=0.2,
        first_timeout_seconds=first,
        timeout_seconds=later,
        on_hang=told.append,
    )


def wait_for(told):
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_phase_that_lasts_too_long_is_told_while_the_rank_waits(tmp_path):
    told: list[str] = []
    other: list[str] = []
    waiting, slow = _heartbeat(tmp_path, 0, told, later=1.0), _heartbeat(tmp_path, 1, other)
    for step in (0, 1):
        for rank in (waiting, slow):
            rank.enter("step", step)
    slow.enter("data", 1)
    wait_for(told)
    time.sleep(0.5)
    assert len(told) == 1 and not other
    assert (
        told[0].startswith("rank 0 has been in phase step for ")
        and "rank 1 on" in told[0]
        and "phase data" in told[0]
    )
    slow.close()
    waiting.close()
    assert {b.rank: (b.step, b.phase) for b in read_beats(tmp_path)}[1] == (1, "end")


def test_before_the_first_step_the_longer_limit_holds(tmp_path):
    told: list[str] = []
    building = _heartbeat(tmp_path, 0, told, first=0.0, later=0.1)
    time.sleep(0.5)
    assert not told
    building.enter("step", 0)
    time.sleep(0.5)
    assert not told  # the first step compiles
    building.enter("step", 1)
    wait_for(told)
    assert len(told) == 1
    building.close()
