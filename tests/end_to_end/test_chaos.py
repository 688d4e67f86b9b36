"""Killed 20 to 32 times at random moments, a fifth or more of them during a save, three stages end as if nothing had happened.

What is killed: one rank, the launcher alone, or everything. CHAOS_SEED repeats a course of events.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmscale.checkpoint import Reader
from ldmscale.checkpoint.folders import complete_checkpoints

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CHECKOUT = Path(__file__).resolve().parents[2]
KILLS = {"autoencoder": 10, "latents": 4, "diffusion": 18}
STEPS = {"autoencoder": 30, "diffusion": 50}
COMMON = ["data.workers=0", "preview.every_steps=0", "tracking.wandb=off", "run.wait=true", "zero=1"]
COMMON += ["checkpoint.save_every_steps=2", "train.log_every_steps=1", "train.garbage_every_steps=0",
           "safety.dry_run=false"]  # fmt: skip


def arguments(place: str) -> dict[str, list[str]]:
    """The three commands; `place` tells the undisturbed run from the other."""
    return {
        "autoencoder": ["autoencoder", "experiment=smoke", f"run.dir={place}/autoencoder",
                        f"train.max_steps={STEPS['autoencoder']}", "loss.gan_start_step=4", "loss.perceptual=none",
                        "scale_samples=8", *COMMON],
        "latents": ["latents", "data=shards", f"data.shards='{place}/autoencoder/data/*.tar'", "data.image_size=32",
                    f"first_stage.path={place}/autoencoder", f"latents.path={place}/latents", "latents.dtype=fp32"],
        "diffusion": ["diffusion", "experiment=smoke", "data=latents", f"data.shards='{place}/latents/*.tar'",
                      f"first_stage.path={place}/autoencoder", f"run.dir={place}/diffusion",
                      f"train.max_steps={STEPS['diffusion']}", *COMMON],
    }  # fmt: skip


def kill(job: dict[str, Any], whom: str, dice: random.Random) -> None:
    everyone = [job["launcher"], *job["ranks"]]
    victims = {"rank": [dice.choice(job["ranks"])], "launcher": [job["launcher"]], "all": everyone}[whom]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(moment: Callable[[], bool], job: dict[str, Any], seconds: float) -> None:
    """Until the moment has come, the job has ended, or so many seconds are over."""
    end = time.monotonic() + seconds
    while not moment() and time.monotonic() < end and running(job["launcher"]):
        time.sleep(0.002)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def unreadable(run: Path) -> list[str]:
    """Faults of checkpoints that count as complete."""
    return [
        fault
        for folder in complete_checkpoints(run / "checkpoints")
        for fault in Reader(folder).wrong_hashes()
    ]


def test_kills_at_random_moments_leave_no_trace(host: Any, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    dice = random.Random(seed)
    for stage, command in arguments("straight").items():
        host.finish(command, tmp_path / f"straight_{stage}.jsonl")
    began, kills, in_saves, course = time.monotonic(), 0, 0, []
    for stage, command in arguments("chaos").items():
        run, done = tmp_path / "chaos" / stage, 0
        # A stage that finished before all its kills leaves them to the last.
        quota = max(KILLS[stage], sum(KILLS.values()) - kills) if stage == "diffusion" else KILLS[stage]
        while done < quota:
            job = host.start(command, tmp_path / f"chaos_{stage}.jsonl")
            begun = time.monotonic()
            saving = stage != "latents" and (in_saves * 3 < kills + 1 or dice.random() < 0.45)
            metrics = run / "metrics.jsonl"
            if saving:
                # From the first file of a save to the last: rank files, manifest, renaming, COMPLETE.
                delay, skip = dice.uniform(0.0, 0.06), dice.randrange(2)
                seen: set[str] = set()

                def under_way(run: Path = run, seen: set[str] = seen, skip: int = skip) -> bool:
                    seen |= {path.name for path in (run / "checkpoints").glob("step_*.tmp")}
                    return len(seen) > skip

                (run / "checkpoints").mkdir(parents=True, exist_ok=True)
                for leaving in (run / "checkpoints").glob("step_*.tmp"):
                    seen.discard(leaving.name)
                wait_for(under_way, job, 60.0)
            elif dice.random() < 0.25 or stage == "latents":
                delay = dice.uniform(0.0, 2.0)  # while it starts, most likely
            else:
                size = metrics.stat().st_size if metrics.exists() else 0
                wait_for(lambda m=metrics, s=size: m.exists() and m.stat().st_size > s, job, 60.0)
                delay = dice.uniform(0.0, 0.5)
            time.sleep(delay)
            whom = dice.choice(["rank", "launcher", "all"])
            alive = running(job["launcher"])
            kill(job, whom, dice)
            status = host.ended()
            assert status != 2, (tmp_path / "log.txt").read_text()[-4000:]
            course.append(
                (stage, whom, "save" if saving else "any", round(time.monotonic() - begun, 1), status)
            )
            if not alive:
                assert status == 0, host.log[-6000:]  # nobody killed it
                break  # it had finished before it could be killed
            done, kills, in_saves = done + 1, kills + 1, in_saves + saving
            # Ranks that lost their launcher may still be saving: mostly the next start has to wait for them.
            if not any(running(pid) for pid in job["ranks"]):
                assert unreadable(run) == [], course
        host.finish(command, tmp_path / f"chaos_{stage}.jsonl")
    seconds = time.monotonic() - began
    print(f"{kills} kills, {in_saves} during a save, in {seconds:.0f} s")
    # How many kills fit depends on the speed of the machine: 32 and a third in saves are aimed at.
    assert kills >= 20 and in_saves * 5 >= kills, course
    for stage in ("autoencoder", "diffusion"):
        assert numbers(tmp_path / "chaos" / stage) == numbers(tmp_path / "straight" / stage), stage
        assert tensors(tmp_path / "chaos" / stage, tmp_path / "straight" / stage) == [], stage
        straight = consumed(tmp_path / f"straight_{stage}.jsonl")
        assert list(straight) == list(range(8 * STEPS[stage]))  # the batch is 8
        assert consumed(tmp_path / f"chaos_{stage}.jsonl") == straight
    assert contents(tmp_path / "chaos" / "latents") == contents(tmp_path / "straight" / "latents")


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
