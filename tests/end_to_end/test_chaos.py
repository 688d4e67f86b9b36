"""Killed 32 times at random moments, a third of them or more during a save, three stages end as if nothing had happened.

What is killed: one rank, the launcher alone, or everything. CHAOS_SEED repeats a course of events. How many steps pass
between two kills depends on the machine, so the number of steps is not fixed: a stage goes on until it has had its kills,
and the undisturbed run, which comes last, takes as many.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmscale.checkpoint.folders import complete_checkpoints
from ldmscale.checkpoint.shards import Reader

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]

KILLS = {"autoencoder": 11, "latents": 4, "diffusion": 17}
BATCH = 8
ENDLESS = 10**6
SECONDS_FOR_A_MOMENT = 120.0  # a start on a busy machine
# No kill after it: ten times what they take on two quiet cores.
SECONDS_FOR_ALL = 1500.0
COMMON = ["data.workers=0", "preview.every_steps=0", "tracking.wandb=off", "run.wait=true", "zero=1", "optim.curve=constant",
          "checkpoint.save_every_steps=2", "train.log_every_steps=1", "train.garbage_every_steps=0",
          "safety.dry_run=false"]  # fmt: skip


def arguments(stage: str, place: str, steps: int) -> list[str]:
    """The command of a stage; `place` tells the undisturbed run from the other."""
    return {
        "autoencoder": ["autoencoder", "experiment=smoke", f"run.dir={place}/autoencoder", f"train.max_steps={steps}",
                        "loss.gan_start_step=4", "loss.perceptual=none", "scale_samples=8", *COMMON],
        "latents": ["latents", "data=shards", f"data.shards='{place}/autoencoder/data/*.tar'", "data.image_size=32",
                    f"first_stage.path={place}/autoencoder", f"latents.path={place}/latents", "latents.dtype=fp32"],
        "diffusion": ["diffusion", "experiment=smoke", "data=latents", f"data.shards='{place}/latents/*.tar'",
                      f"first_stage.path={place}/autoencoder", f"run.dir={place}/diffusion", f"train.max_steps={steps}",
                      "ema.power_widths=[0.05,0.1]", "ema.store_every_steps=3", *COMMON],
    }[stage]  # fmt: skip


class Chaos:
    """Starts a stage again and again, and kills it."""

    def __init__(self, host: Any, place: Path, dice: random.Random) -> None:
        self.host, self.place, self.dice = host, place, dice
        self.kills = self.in_saves = 0
        self.course: list[tuple[Any, ...]] = []
        self._deck: list[str] = []
        self._end = time.monotonic() + SECONDS_FOR_ALL

    def stage(self, stage: str, quota: int) -> int:
        """Kill it `quota` times and let it finish; the steps that it took."""
        run, done = self.place / "chaos" / stage, 0
        keys = self.place / f"chaos_{stage}.jsonl"
        while done < quota and time.monotonic() < self._end:
            job = self.host.start(arguments(stage, "chaos", ENDLESS), keys)
            begun, before = time.monotonic(), attempts(run)
            aim = self._aim(stage)
            self._wait_for_the_moment(aim, run, before, job)
            alive = running(job["launcher"])
            saving = save_under_way(run, before)
            whom = self._kill(job)
            status = self.host.ended()
            self.course.append((stage, whom, aim, saving, round(time.monotonic() - begun, 1), status))
            if not alive:
                assert stage == "latents" and status == 0, self.host.log[-6000:]  # nobody killed it
                break  # the set was whole before it could be killed
            assert status != 2, self.host.log[-6000:]
            done, self.kills, self.in_saves = done + 1, self.kills + 1, self.in_saves + saving
            # Ranks that lost their launcher may still be saving: then the next start has to wait for them.
            if not any(running(pid) for pid in job["ranks"]):
                assert unreadable(run) == [], self.course
        steps = last_step(run) + 5  # ranks without a launcher may go on for one
        self.host.finish(arguments(stage, "chaos", steps), keys)
        return steps

    def _aim(self, stage: str) -> str:
        """What it shall be doing when it is killed."""
        if stage == "latents":
            return "start"
        if self.in_saves * 5 < (self.kills + 1) * 2:  # two fifths, since latents save nothing
            return "save"
        return self.dice.choice(["start", "step", "step", "save"])

    def _wait_for_the_moment(self, aim: str, run: Path, before: int, job: dict[str, Any]) -> None:
        metrics = run / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        delay = 0.0
        if aim == "save":
            wait_for(lambda: save_under_way(run, before), job)
            # Anywhere from the first file to COMPLETE, but rather too early than too late.
            delay = self.dice.choice([0.0, 0.0, self.dice.uniform(0.0, 0.02)])
        elif aim == "step":
            wait_for(lambda: metrics.exists() and metrics.stat().st_size > size, job)
            delay = self.dice.uniform(0.0, 0.3)
        else:
            delay = self.dice.uniform(0.0, 2.0)
        time.sleep(delay)

    def _kill(self, job: dict[str, Any]) -> str:
        if not self._deck:  # each kind as often as the others
            self._deck = ["rank", "launcher", "all"]
            self.dice.shuffle(self._deck)
        whom = self._deck.pop()
        everyone = [job["launcher"], *job["ranks"]]
        victims = {"rank": [self.dice.choice(job["ranks"])], "launcher": [job["launcher"]], "all": everyone}
        for pid in victims[whom]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return whom


def test_kills_at_random_moments_leave_no_trace(host: Any, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    chaos, began = Chaos(host, tmp_path, random.Random(seed)), time.monotonic()
    steps = {}
    for stage in KILLS:
        # Latents that were whole before all their kills leave these to the last stage.
        quota = KILLS[stage] if stage != "diffusion" else sum(KILLS.values()) - chaos.kills
        steps[stage] = chaos.stage(stage, quota)
    whom = Counter(victim for _, victim, *_ in chaos.course)
    print(
        f"{chaos.kills} kills {dict(whom)}, {chaos.in_saves} during a save, in {time.monotonic() - began:.0f} s, {steps}"
    )
    assert chaos.kills >= 30 and chaos.in_saves * 3 >= chaos.kills, chaos.course
    for stage in KILLS:
        host.finish(arguments(stage, "straight", steps[stage]), tmp_path / f"straight_{stage}.jsonl")
    for stage in ("autoencoder", "diffusion"):
        assert unreadable(tmp_path / "chaos" / stage) == []
        assert numbers(tmp_path / "chaos" / stage) == numbers(tmp_path / "straight" / stage), stage
        assert tensors(tmp_path / "chaos" / stage, tmp_path / "straight" / stage) == [], stage
        assert averages(tmp_path / "chaos" / stage) == averages(tmp_path / "straight" / stage), stage
        straight = consumed(tmp_path / f"straight_{stage}.jsonl")
        assert list(straight) == list(range(BATCH * steps[stage]))
        assert consumed(tmp_path / f"chaos_{stage}.jsonl") == straight
    assert len(averages(tmp_path / "chaos" / "diffusion")) == steps["diffusion"] // 3
    assert contents(tmp_path / "chaos" / "latents") == contents(tmp_path / "straight" / "latents")


def wait_for(moment: Callable[[], bool], job: dict[str, Any]) -> None:
    """Until the moment has come, the job has ended, or time is over."""
    end = time.monotonic() + SECONDS_FOR_A_MOMENT
    while not moment() and time.monotonic() < end and running(job["launcher"]):
        time.sleep(0.002)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def attempts(run: Path) -> int:
    """The number of the latest start, which a launcher that was killed may have left running."""
    with suppress(OSError, ValueError):
        return int(json.loads((run / "run.json").read_text())["attempts"])
    return 0


def save_under_way(run: Path, before: int) -> bool:
    """Whether a start later than `before` is at work on a checkpoint, from its first file to COMPLETE."""
    for path in (run / "checkpoints").glob("step_*"):
        written = re.fullmatch(r"step_\d+\.(\d+)\.tmp", path.name)
        if written is not None and int(written[1]) > before:
            return True
        if re.fullmatch(r"step_\d+", path.name) and not (path / "COMPLETE").exists() and path.exists():
            return attempts(run) > before
    return False


def last_step(run: Path) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def unreadable(run: Path) -> list[str]:
    """Faults of checkpoints that count as complete."""
    return [
        fault
        for folder in complete_checkpoints(run / "checkpoints")
        for fault in Reader(folder).wrong_hashes()
    ]


def numbers(run: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl that is not a time or a memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/", "memory/")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def tensors(one: Path, other: Path) -> list[str]:
    """Keys of the last checkpoints' tensors that differ in any bit."""
    ours, theirs = (Reader(complete_checkpoints(run / "checkpoints")[-1]) for run in (one, other))
    assert ours.manifest.keys.keys() == theirs.manifest.keys.keys()
    keys = [key for key in ours.manifest.keys if not key.startswith("process/")]
    return [key for key in keys if not torch.equal(ours.tensor(key), theirs.tensor(key))]


def averages(run: Path) -> dict[str, dict[str, str]]:
    """Hashes of the averages that were stored, all of them, by step and file of a rank."""
    return {
        folder.name: {file.name: file.xxh3_128 for file in Reader(folder).manifest.files}
        for folder in complete_checkpoints(run / "averages")
    }


def consumed(file: Path) -> dict[int, str]:
    """Key of each position that was trained on. A position that was repeated must have had the same key."""
    found: dict[int, str] = {}
    for line in file.read_text().splitlines():
        with suppress(ValueError):  # the last line of a killed rank
            entry = json.loads(line)
            assert found.setdefault(entry["position"], entry["key"]) == entry["key"]
    return dict(sorted(found.items()))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}
