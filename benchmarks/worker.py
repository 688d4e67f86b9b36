"""One contender in a process of its own: `python -m benchmarks.worker JSON`.

It answers one line of JSON to each command on its standard input: `check FILE` (loss, output and the norm of
every parameter's gradient of the first step go to FILE), `step`, `memory`, `end`.

A process for each lets ours set the allocator as the trainer does without setting it for the others, and
keeps one contender's heap and thread pools out of the other's.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import Contender, Task, stepper
from benchmarks.names import canonical


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given.pop("threads"))
    keep_memory = given.pop("keep_memory")
    contender = Contender(**given)
    if contender.who == "ours":
        from ldmscale.train.engine.process import connect, disconnect

        connect(torch.device("cpu"))
    elif keep_memory:
        from ldmscale.train.engine.process import keep_freed_memory

        keep_freed_memory()
    torch.manual_seed(0)
    task = Task(contender)
    work = stepper(contender, task) if contender.what == "backward" else None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "check":
            torch.save(first_step(task), argument)
            answer: dict[str, Any] = {"parameters": sum(p.numel() for p in task.network.parameters())}
            work = work or stepper(contender, task)  # the engine takes the network over only now
            gc.collect()
        elif command == "step":
            assert work is not None
            answer = timed(work)
        elif command == "memory":
            assert work is not None
            answer = {"peak": peak_bytes(work), "held": held_bytes()}
        else:
            break
        answers.write(json.dumps(answer) + "\n")
    if contender.who == "ours":
        disconnect()


def first_step(task: Task) -> dict[str, Any]:
    """Loss, output and gradient norms, by plain autograd."""
    loss, output = task.forward(task.network)
    loss.backward()
    norms = {
        canonical(n): float(p.grad.norm()) for n, p in task.network.named_parameters() if p.grad is not None
    }
    task.network.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "output": output.detach().contiguous(), "norms": norms}


def timed(work: Callable[[], float]) -> dict[str, float]:
    """Seconds on the clock and of the processor (all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}


def peak_bytes(work: Callable[[], float]) -> int:
    """Most bytes allocated at a time within a step, over those that were there before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def held_bytes() -> int:
    """Bytes of all tensors that stay between steps: weights, gradients, optimiser state, average, batch."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            if thing.grad is not None:
                found[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
    return sum(found.values())


if __name__ == "__main__":
    main()
