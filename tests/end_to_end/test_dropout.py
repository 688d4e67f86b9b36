"""Dropout masks are those of the samples: ranks draw different ones, and a run that moves between rank counts the same.

transformers#31412: the same masks on all ranks, by one seed for all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

COMMAND = [
    "diffusion", "experiment=smoke", "data.workers=0", "safety.dry_run=false", "optim.curve=constant", "optim.lr=1e-3",
    "train.global_batch=8", "train.rank_micro_batch=4", "unet.dropout=0.5", "text_encoder.dropout=0.2",
]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/total"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_dropout_has_the_same_losses_on_one_rank_and_moved_from_two(
    host: Any, tmp_path: Path
) -> None:
    def job(run: str, ranks: int, steps: int, *settings: str) -> None:
        command = [*COMMAND, f"run.dir={run}", f"train.max_steps={steps}", *settings]
        host.finish(command, tmp_path / "keys.jsonl", ranks=ranks)

    job("straight", 1, 4, "zero=0")
    job("moved", 2, 2, "zero=3")
    job("moved", 1, 4, "zero=0")
    assert "resuming with a change: the number of ranks was 2, is 1" in host.log
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
