"""Runs contenders side by side, one step of each in turn, and compares each with the first.

The turns alternate in direction, and a ratio is taken within a round: a load that comes and goes meets all of
them. Nothing is timed before outputs and gradients are found equal.
"""

from __future__ import annotations

import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender

ROOT = Path(__file__).resolve().parent.parent
BURST_SECONDS, BETWEEN_SECONDS = 20.0, 12.0
_SECONDS_TO_ANSWER = 900.0  # one step, or one comparison, on a busy machine


@dataclass(frozen=True)
class Row:
    """What was measured of a contender; ratios are to the first contender of the contest."""

    name: str
    seconds: float  # median
    fastest: float
    cpu_seconds: float  # least, over all threads
    paired: float  # median of the ratios within each round
    minimum: float  # ratio of the fastest steps
    cpu: float
    step_mib: float  # most that a step allocates over what is held
    held_mib: float
    rounds: int


class Worker:
    def __init__(self, contender: Contender, threads: int, keep_memory: bool) -> None:
        self.contender = contender
        settings = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            # A worker that waits for its turn must leave the cores to the one whose turn it is.
            "OMP_WAIT_POLICY": "passive",
        }
        for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            settings.pop(variable, None)
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, closed in end()
        given = asdict(contender) | {"threads": threads, "keep_memory": keep_memory}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(given)],
            cwd=ROOT,
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: its log says why
        ready, _, _ = select.select([self._process.stdout], [], [], _SECONDS_TO_ANSWER)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(
                f"{self.contender.name} ended or hung at {command!r}:\n{self._log.read()[-4000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._process.poll() is None:
            try:
                self._process.stdin.write("end\n")
                self._process.stdin.close()
                self._process.wait(timeout=30)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._log.close()


class Bursts:
    """Time that rounds take. On a machine that is shared, and for root: at real-time priority, in bursts.

    In a burst no other process gets a core (but for the twentieth that Linux keeps for them); between bursts they all do, so
    that nothing else fails for want of time.
    """

    def __init__(self, process_ids: Sequence[int], workers: Sequence[Worker]) -> None:
        self.seconds = 0.0  # in rounds
        self._processes = [*process_ids, os.getpid()] if process_ids else []
        self._workers = workers
        self._last = time.monotonic()
        self._ends = 0.0 if process_ids else math.inf

    def next_round(self) -> None:
        """Call before each round."""
        self.seconds += (now := time.monotonic()) - self._last
        if now > self._ends:
            self._schedule(os.SCHED_OTHER, 0)
            time.sleep(BETWEEN_SECONDS if self._ends else 0)
            self._schedule(os.SCHED_FIFO, 1)
            self._ends = time.monotonic() + BURST_SECONDS
            for worker in self._workers:
                worker.ask("step")  # others have used the caches
        self._last = time.monotonic()

    def end(self) -> None:
        self._schedule(os.SCHED_OTHER, 0)

    def _schedule(self, policy: int, priority: int) -> None:
        for process in self._processes:
            for thread in Path(f"/proc/{process}/task").glob("*"):
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))


def contest(
    contenders: Sequence[Contender],
    *,
    threads: int,
    seconds: float,
    rounds: int,
    keep_memory: bool = False,
    alone: bool = False,
) -> list[Row]:
    """At most `rounds` rounds, and none begun after `seconds` of them; at least one.

    With `keep_memory` all contenders get the allocator that ours sets for itself. With `alone` the rounds run in bursts
    in which nothing else on the machine runs (`Bursts`).

    Raises AssertionError where outputs, gradients or losses differ.
    """
    workers: list[Worker] = []
    bursts: Bursts | None = None
    try:
        workers = [Worker(contender, threads, keep_memory) for contender in contenders]
        assert_equal(workers)
        for worker in workers:
            worker.ask("step")  # warms up; the engine's first step allocates its state
        memory = [worker.ask("memory") for worker in workers]
        taken: list[list[dict[str, float]]] = []
        bursts = Bursts([worker.process_id for worker in workers] if alone else [], workers)
        while not taken or (len(taken) < rounds and bursts.seconds < seconds):
            bursts.next_round()
            order = workers if len(taken) % 2 == 0 else workers[::-1]
            answers = {id(worker): worker.ask("step") for worker in order}
            taken.append([answers[id(worker)] for worker in workers])
        assert_losses_stay_equal(contenders, taken[-1])
    finally:
        if bursts is not None:
            bursts.end()
        for worker in workers:
            worker.end()
    return [row(contender, index, taken, memory[index]) for index, contender in enumerate(contenders)]


def assert_equal(workers: Sequence[Worker]) -> None:
    """Every contender gives the first one's loss, output and gradients, up to the rounding of fp32."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for index, worker in enumerate(workers):
            path = Path(folder) / f"{index}.pt"
            worker.ask(f"check {path}")
            found.append(torch.load(path, weights_only=True))
    first = found[0]
    largest = max(first["norms"].values())
    for worker, other in zip(workers[1:], found[1:], strict=True):
        name = worker.contender.name
        error = float((other["output"] - first["output"]).abs().max() / first["output"].abs().max())
        assert error < 2e-5, f"{name}: the output differs by {error:.1e}"
        assert abs(other["loss"] / first["loss"] - 1) < 1e-5, (
            f"{name}: loss {other['loss']}, not {first['loss']}"
        )
        assert other["norms"].keys() == first["norms"].keys(), f"{name} trains other parameters"
        for key, norm in first["norms"].items():
            assert abs(other["norms"][key] - norm) < 2e-5 * largest, f"{name}: gradient of {key}"


def assert_losses_stay_equal(contenders: Sequence[Contender], last: Sequence[dict[str, float]]) -> None:
    """After as many updates the losses still agree: clipping, AdamW and its rates are the same."""
    for contender, answer in zip(contenders, last, strict=True):
        error = abs(answer["loss"] / last[0]["loss"] - 1)
        assert error < 1e-4, f"{contender.name}: after the last round the loss differs by {error:.1e}"


def row(contender: Contender, index: int, taken: list[list[dict[str, float]]], memory: dict[str, int]) -> Row:
    walls, firsts = [r[index]["wall"] for r in taken], [r[0]["wall"] for r in taken]
    cpu, first_cpu = min(r[index]["cpu"] for r in taken), min(r[0]["cpu"] for r in taken)
    return Row(
        name=contender.name,
        seconds=statistics.median(walls),
        fastest=min(walls),
        cpu_seconds=cpu,
        paired=statistics.median(w / f for w, f in zip(walls, firsts, strict=True)),
        minimum=min(walls) / min(firsts),
        cpu=cpu / first_cpu,
        step_mib=memory["peak"] / 2**20,
        held_mib=memory["held"] / 2**20,
        rounds=len(taken),
    )
