"""Which checkpoints stay: the last ones, the lasting ones, the best, and never fewer than two."""

from __future__ import annotations

from pathlib import Path

from ldmscale.checkpoint.folders import Kept, Retention, complete_checkpoints, staying
from ldmscale.checkpoint.manager import CheckpointManager


def test_the_newest_two_stay_whatever_is_asked() -> None:
    found = [Kept(step, ephemeral=True) for step in (1, 2, 3)]
    assert staying(found, Retention(keep_last=0)) == {2, 3}


def test_ephemeral_ones_go_when_there_are_newer_ones_and_do_not_count_as_last() -> None:
    found = [Kept(10), Kept(20), Kept(25, ephemeral=True), Kept(30), Kept(35, ephemeral=True)]
    assert staying(found, Retention(keep_last=3)) == {10, 20, 30, 35}


def test_every_nth_stays_for_ever() -> None:
    found = [Kept(step) for step in range(10, 110, 10)]
    assert staying(found, Retention(keep_last=2, keep_every_steps=40)) == {40, 80, 90, 100}


def test_the_best_by_a_metric_stay_and_those_without_it_are_not_best() -> None:
    found = [Kept(1, score=0.5), Kept(2, score=0.1), Kept(3, score=float("nan")), Kept(4), Kept(5, score=0.9)]
    found.append(Kept(6))
    assert staying(found, Retention(keep_best=1, best_metric="m")) == {2, 5, 6}
    highest = Retention(keep_best=2, best_metric="m", best_is="highest")
    assert staying(found, highest) == {1, 5, 6}


def test_the_manager_reads_what_decides_from_the_manifests_of_earlier_starts(tmp_path: Path) -> None:
    retention = Retention(keep_best=1, best_metric="validation/loss")
    for step, loss in ((1, 0.3), (2, 0.2), (3, 0.4), (4, 0.5), (5, 0.6)):
        manager = CheckpointManager(tmp_path, retention=retention)  # as after a restart
        manager.save(step, [], {"metrics": {"validation/loss": loss}, "ephemeral": step == 3})
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]
