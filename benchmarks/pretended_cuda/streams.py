"""Stand-ins for torch.cuda's streams, events and queries, which count their calls: DeepSpeed needs them, a CPU build has none."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.pretended_cuda.mode import CUDA

WAITS = ("stream.synchronize", "event.synchronize", "device.synchronize")  # of the host for the device
_MEMORY = 80 * 2**30


def pretend_streams(ranks: int) -> Counter[str]:
    """Replaces torch.cuda's functions until the process ends, and returns the counter of calls. Before DeepSpeed's import."""
    calls: Counter[str] = Counter()

    class Stream:
        device = CUDA

        def __init__(self, *_: Any, **__: Any) -> None:
            calls["Stream()"] += 1

        def synchronize(self) -> None:
            calls["stream.synchronize"] += 1

        def wait_stream(self, _: Any) -> None:
            calls["stream.wait_stream"] += 1

        def wait_event(self, _: Any) -> None:
            calls["stream.wait_event"] += 1

        def query(self) -> bool:
            return True

        def record_event(self, _: Any = None) -> Event:
            return Event()

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, *_: Any) -> None:
            calls["event.record"] += 1

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            calls["event.synchronize"] += 1

        def elapsed_time(self, _: Any) -> float:
            return 0.0

    def counting(name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            calls[name] += 1

        return call

    def answering(value: Any) -> Any:
        return lambda *_, **__: value

    one = Stream()
    properties = SimpleNamespace(
        major=9, minor=0, total_memory=_MEMORY, name="pretended H100", multi_processor_count=132
    )
    replacements = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": answering(one),
        "default_stream": answering(one),
        "stream": lambda _: nullcontext(),
        "synchronize": counting("device.synchronize"),
        "set_device": counting("set_device"),
        "is_available": answering(True),
        "is_initialized": answering(True),
        "is_bf16_supported": answering(True),
        "device_count": answering(ranks),
        "current_device": answering(0),
        "get_device_capability": answering((9, 0)),
        "get_device_name": answering(properties.name),
        "get_device_properties": answering(properties),
        "mem_get_info": answering((_MEMORY, _MEMORY)),
        "memory_stats": answering({}),
        "nvtx": SimpleNamespace(range_push=answering(None), range_pop=answering(None)),
    }
    for name in ("allocated", "reserved"):
        replacements |= {f"memory_{name}": answering(0), f"max_memory_{name}": answering(0)}
    for name in (
        "empty_cache",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        "reset_max_memory_cached",
    ):
        replacements[name] = answering(None)
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    setattr(torch.Tensor, "record_stream", counting("record_stream"))  # noqa: B010
    calls.clear()
    return calls
