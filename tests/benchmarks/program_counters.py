"""Counts of graphs that are small enough to be computed by hand, as one JSON object. Run by test_pretended_cuda.py."""

from __future__ import annotations

import json
from dataclasses import asdict

from benchmarks.pretended_cuda.device import pretend

pretend()

import torch  # noqa: E402 (after `pretend`)

from benchmarks.pretended_cuda.mode import PretendedCuda  # noqa: E402

found = {}
with PretendedCuda(scalar=2.0) as gpu:
    layer = torch.nn.Linear(4, 8, device="cuda")
    x = torch.ones(2, 4, device="cuda")

    gpu.counters.reset()
    y = torch.relu(layer(x))
    found["forward"] = asdict(gpu.counters.totals()) | {
        "bytes": sum(call.bytes for call in gpu.counters.calls)
    }

    gpu.counters.reset()
    torch.nn.functional.silu(layer(x)).sum().backward()
    found["backward"] = asdict(gpu.counters.totals())
    found["gradient"] = [str(layer.weight.grad.device), list(layer.weight.grad.shape)]

    gpu.counters.reset()
    found["item"], found["list"] = y.sum().item(), y[0, :2].tolist()
    y.cpu()
    y.to("cpu", non_blocking=True)
    torch.cuda.synchronize()
    found["waits"] = gpu.counters.totals().notes

    gpu.counters.reset()
    batch = torch.ones(3, 5)
    batch.to("cuda")
    batch.to("cuda", non_blocking=True)
    pinned = torch.ones(3, 5).pin_memory()
    pinned.to("cuda", non_blocking=True)
    pinned[1:].to("cuda", non_blocking=True)
    pinned.to("cuda")
    y.copy_(torch.ones(2, 8))
    found["copies"] = gpu.counters.totals().notes
    found["copied"] = gpu.counters.totals().where

    gpu.counters.reset()
    held = gpu.counters.held_bytes
    first = torch.empty(1024, device="cuda")
    second = torch.empty(1024, device="cuda")
    del first
    third = torch.empty(512, device="cuda")
    found["peak"], found["held"] = gpu.counters.peak_bytes - held, gpu.counters.held_bytes - held

    gpu.counters.reset()
    y[torch.tensor([1, 0])]
    found["index"] = gpu.counters.totals().notes

    found["host"] = (torch.ones(2) + 1).tolist()  # CPU tensors keep their values
    gpu.counters.reset()
    torch.ones(4) @ torch.ones(4)
    found["of the host"] = gpu.counters.totals().operators
print(json.dumps(found))
