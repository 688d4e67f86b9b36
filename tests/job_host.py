"""Starts jobs on forked ranks, so that thirty starts do not pay thirty times for their imports.

One process imports everything and forks: first a launcher, which forks its ranks and waits for them as ours
does. Ranks and launchers are processes like any other, to be killed by their numbers; what runs in a rank is
the real command line. A line of JSON on standard input starts a job:

    {"arguments": [...], "ranks": 2, "folder": "...", "stdin": "...", "stdout": "...", "stderr": "...", "keys": "...",
     "environment": {}, "beside": false}

and the answers are {"launcher": PID, "ranks": [PID, ...]}, later {"status": STATUS}; that of a job which runs beside
others comes when {"wait": PID} asks for it. With "ranks": null the job runs without a launcher, and there is one answer.
With "keys" each rank appends the keys of the samples that it trains on, with their positions, to that file.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401
import torch
import torch._dynamo  # optimisers import it, and sympy with it: half of a start otherwise
import torch.distributed.fsdp

import ldmscale.builders.attention
import ldmscale.inference.load
import ldmscale.jobs.autoencoder
import ldmscale.jobs.diffusion
import ldmscale.jobs.latents
import ldmscale.setup.first_stage
import ldmscale.setup.trainer
import ldmscale.stages.autoencoder
import ldmscale.stages.diffusion  # noqa: F401
from ldmscale import cli, launcher
from ldmscale.data.loading import loader, training_data

# What waits for the dead waits for less here.
launcher._PATIENCE_AFTER_FAILURE = 0.3
launcher._SECONDS_TO_TERMINATE = 2.0


def watch_loader(keys: str) -> None:
    """In a forked process: write down what the loader yields."""

    class WatchedLoader(loader.Loader):
        def __next__(self) -> dict[str, Any]:
            batch = super().__next__()
            lines = [
                json.dumps({"position": position, "key": key})
                for position, key in zip(batch["position"].tolist(), batch["key"], strict=True)
            ]
            with open(keys, "a") as file:
                file.write("\n".join(lines) + "\n")
            return batch

    training_data.Loader = WatchedLoader  # type: ignore[misc]


class Rank:
    """A forked rank, with as much of subprocess.Popen as the launcher's waiting needs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class InRank(Exception):
    """Unwinds the host's stack in a forked rank."""


def start(job: dict[str, Any], answers: int) -> None:
    """In the launcher's process: fork the ranks, tell their numbers, wait for them."""
    folder = Path(job["folder"])
    shared = launcher.shared_environment(os.environ, job["ranks"], 0)
    parted = None
    if job["arguments"][0] in launcher._INDEPENDENT:
        parted = Path(tempfile.mkdtemp(dir=folder.parent))
        shared[launcher.PARTED] = str(parted)
    ranks: list[Rank] = []
    for rank in range(job["ranks"]):
        ask = launcher._end_with_parent()
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), launcher.LAUNCHER: str(os.getpid())}
        if (pid := os.fork()) == 0:
            assert ask is not None
            ask()
            if rank:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(shared | own)
            raise InRank
        ranks.append(Rank(pid))
    reply({"launcher": os.getpid(), "ranks": [rank.pid for rank in ranks]}, answers)
    os._exit(launcher._wait(ranks, parted))  # type: ignore[arg-type]


def end_with_parent() -> None:
    """Ask the kernel for SIGKILL should the parent die: of a test run that was killed, nothing is left."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def reply(answer: dict[str, Any], answers: int = 1) -> None:
    os.write(answers, (json.dumps(answer) + "\n").encode())


def jobs() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> int:
    end_with_parent()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # in every fork too, to the log of its job
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a rank's collector would otherwise touch, and so copy, everything that it shares with this process
    for job in jobs():
        if "wait" in job:
            reply({"status": os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])})
            continue
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(job["environment"])
            os.chdir(job["folder"])
            answers = os.dup(1)
            for number, part in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(job[part], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.dup2(os.open(job.get("stdin", os.devnull), os.O_RDONLY), 0)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115
            random.seed()  # the launcher chooses its port by it, and every fork begins with the same state
            if job.get("keys"):
                watch_loader(job["keys"])
            if job["ranks"] is None:
                os.close(answers)
                return cli.main(job["arguments"])
            try:
                start(job, answers)
            except InRank:
                os.close(answers)
                return cli.main(job["arguments"])
        if not job["beside"]:
            reply({"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
    return 0


if __name__ == "__main__":
    sys.exit(main())
