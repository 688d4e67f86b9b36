"""One run on 2, 4, 1 and 3 ranks, each with another ZeRO stage and accumulation, is the run that was never moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMAND = [
    "diffusion", "experiment=smoke", "data.workers=0", "preview.every_steps=0", "tracking.wandb=off",
    "train.garbage_every_steps=0", "safety.dry_run=false", "optim.curve=constant", "optim.lr=1e-3",
    "checkpoint.save_every_steps=5", "checkpoint.keep_last=9", "train.precision=fp32",
]  # fmt: skip
BATCH, STEPS = 12, 20
WHOLE = ["zero=3", "train.rank_micro_batch=6", f"train.global_batch={BATCH}"]
LEGS = [  # ranks, settings, until
    (2, ["zero=3", "zero.persistence_threshold=0", "train.rank_micro_batch=3"], 5),
    (4, ["zero=1", "train.rank_micro_batch=3"], 10),
    (1, ["zero=0", "train.rank_micro_batch=4"], 15),
    (3, ["zero=2", "train.rank_micro_batch=2"], 20),
]
OTHER_BATCH = 24


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def consumed(file: Path) -> dict[int, str]:
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return {entry["position"]: entry["key"] for entry in entries}


def assert_same_run(found: Path, expected: Path, steps: int) -> None:
    one, other = lines(found), lines(expected)
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(1, steps + 1))
    assert [line["images_seen"] for line in one] == [line["images_seen"] for line in other]
    for key in ("loss/total", "gradient_norm"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in other], rel=1e-5), key


def test_moved_three_times_a_run_has_the_losses_and_samples_of_one_that_stayed(
    host: Any, tmp_path: Path
) -> None:
    def job(run: str, ranks: int, settings: list[str], until: int) -> None:
        command = [*COMMAND, f"run.dir={run}", f"train.max_steps={until}", *settings]
        host.finish(command, tmp_path / f"{run}.jsonl", ranks=ranks)

    job("straight", 2, WHOLE, STEPS)
    for ranks, settings, until in LEGS:
        if until == STEPS:  # kept, to go on otherwise
            shutil.copytree(tmp_path / "moved", tmp_path / "moved_larger")
        job("moved", ranks, [*settings, f"train.global_batch={BATCH}"], until)
    assert_same_run(tmp_path / "moved", tmp_path / "straight", STEPS)
    assert consumed(tmp_path / "moved.jsonl") == consumed(tmp_path / "straight.jsonl")
    assert (
        list(consumed(tmp_path / "moved.jsonl")) and len(consumed(tmp_path / "moved.jsonl")) == BATCH * STEPS
    )
    # With another batch from step 15 on, too.
    shutil.copytree(tmp_path / "straight", tmp_path / "straight_larger")
    shutil.rmtree(tmp_path / "straight_larger" / "checkpoints" / "step_00000020")
    larger = f"train.global_batch={OTHER_BATCH}"
    job("straight_larger", 2, ["zero=3", "train.rank_micro_batch=6", larger], STEPS + 1)
    job("moved_larger", 3, ["zero=2", "train.rank_micro_batch=4", larger], STEPS + 1)
    assert_same_run(tmp_path / "moved_larger", tmp_path / "straight_larger", STEPS + 1)
    assert lines(tmp_path / "moved_larger")[-1]["images_seen"] == 15 * BATCH + 6 * OTHER_BATCH
    one, other = (consumed(tmp_path / f"{run}_larger.jsonl") for run in ("moved", "straight"))
    assert {p: key for p, key in one.items() if p} == {p: key for p, key in other.items() if p}
    assert "resuming with a change: train.global_batch was 12, is 24" in host.log
