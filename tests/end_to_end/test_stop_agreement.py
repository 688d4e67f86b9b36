"""A signal to any single rank at any step: all ranks stop after the same step, with a complete save, and go on from it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ldmscale.checkpoint.shards import Reader

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = 3
COMMAND = [
    "diffusion", "experiment=smoke", "data.workers=0", "run.dir=run", "train.max_steps=100000", "train.global_batch=6",
    "preview.every_steps=0", "checkpoint.save_every_steps=0", "tracking.wandb=off", "train.garbage_every_steps=0",
]  # fmt: skip


def test_a_signal_to_each_single_rank_of_three_stops_all_of_them_alike(host: Any, tmp_path: Path) -> None:
    seed = int(os.environ.get("STOP_SEED", random.SystemRandom().randrange(10**6)))
    print(f"STOP_SEED={seed}")
    dice = random.Random(seed)
    run, saved = tmp_path / "run", 0
    for rank in range(RANKS):
        job = host.start(COMMAND, tmp_path / "keys.jsonl", ranks=RANKS)
        number = dice.choice([signal.SIGTERM, signal.SIGUSR1])
        until = saved + dice.randrange(1, 6)
        deadline = time.monotonic() + 180
        while done(run) < until:
            assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()[-4000:]
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 0.2))
        os.kill(job["ranks"][rank], number)
        # Schedulers insist: further signals, to all, while it saves and ends.
        for _ in range(dice.randrange(4)):
            time.sleep(dice.uniform(0.0, 0.15))
            for pid in job["ranks"]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        assert host.ended() == 75, (tmp_path / "log.txt").read_text()[-6000:]
        reader = Reader(run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip())
        assert reader.wrong_hashes() == [] and reader.manifest.world_size == RANKS
        assert reader.manifest.step == done(run) >= until
        saved = done(run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved + 1))  # neither gap nor double
    log = (tmp_path / "log.txt").read_text()
    assert all(f"(rank {rank})" in log for rank in range(RANKS))


def done(run: Path) -> int:
    """The last step in metrics.jsonl."""
    with suppress(OSError, IndexError, ValueError):
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0
