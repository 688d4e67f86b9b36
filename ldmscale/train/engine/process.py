"""Joins and leaves the process group that DeepSpeed works in, and routes its log messages.

DeepSpeed is imported inside functions, because the import takes seconds.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ldmscale.distributed.devices import use_device
from ldmscale.distributed.environment import read_ranks
from ldmscale.distributed.muster import gather_at_store
from ldmscale.train.engine.deepspeed_internals import skip_shared_memory_extension


def quieten() -> None:
    """DeepSpeed's warnings go the way of our own, and what it and torch say at every start goes nowhere."""
    chatter = logging.getLogger("DeepSpeed")
    chatter.setLevel(logging.WARNING)
    chatter.handlers.clear()  # it writes to stdout, past the run's log files and into the progress bars
    chatter.propagate = True
    for collective in (
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "_all_gather_base",
        "_reduce_scatter_base",
    ):
        warnings.filterwarnings("ignore", message=f".*{collective}.*", category=FutureWarning)


@contextmanager
def only_errors() -> Iterator[None]:
    """Drops DeepSpeed's warnings inside: it logs one for every window without an update."""
    chatter = logging.getLogger("DeepSpeed")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatter.setLevel(level)


def _import_muon_plainly() -> None:
    """Spare every job seconds at its start: DeepSpeed imports Muon, which is not used here, and Muon's decorators
    load all of torch's compiler."""

    def plainly(function: Any = None, **_: Any) -> Any:
        return function if function is not None else plainly

    compile_function = torch.compile
    setattr(torch, "compile", plainly)  # noqa: B010, since mypy refuses the plain assignment
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        setattr(torch, "compile", compile_function)  # noqa: B010


_OF_ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
_before: dict[str, str | None] = {}  # values that `connect` replaced, for `disconnect` to restore


def connect(device: torch.device, *, timeout_seconds: float = 1800.0) -> None:
    """Make DeepSpeed ready for this process, with a process group: gloo on CPU, NCCL on CUDA.

    A group that exists is used; else the one that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name is
    joined; without them a group of one is made. `timeout_seconds` holds for every collective of a group made
    here, and should be long, since the first steps compile, fetch and allocate.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in os.environ
    if alone:  # DeepSpeed reads these in several places
        for name in _OF_ONE_RANK:
            _before.setdefault(name, os.environ.get(name))
        os.environ |= _OF_ONE_RANK
    # DeepSpeed decides this at its import, and would take any GPU that it sees.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Before the group is made: DeepSpeed's default arguments would keep a group that exists alive for ever.
    import deepspeed

    quieten()
    _import_muon_plainly()
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        use_device(device)
        # DeepSpeed takes LOCAL_RANK for the device's number, which it is not where each task sees one GPU.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    else:
        # Otherwise DeepSpeed compiles a shared-memory extension: a minute in the first job, and a lock file
        # that hangs every later job if this one is killed meanwhile. gloo does the same work.
        skip_shared_memory_extension()
        keep_freed_memory()
    if not dist.is_initialized():
        if alone:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            ranks = read_ranks()
            dist.init_process_group(
                backend,
                store=gather_at_store(ranks, timeout=timeout),
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=timeout,
            )
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def disconnect() -> None:
    """Leave the process group, if there is one, and restore the environment: child processes are no ranks.

    A process that is one of several ranks cannot connect again.
    """
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    if dist.is_initialized():
        from deepspeed import comm

        comm.destroy_process_group()
        # gloo's threads may still hold tensors of the last collectives, and engines that live on hold the threads.
        # A thread that lets go of a tensor while the interpreter shuts down aborts the process, after all is done.
        time.sleep(0.2)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_WHOLE = 32 << 20  # bytes, the most that glibc takes; larger blocks get a mapping of their own
_STEP = 64 << 20  # bytes that the heap grows by


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; False where the C library is another one, or refuses."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # Once one of the three is set, glibc adapts none of them by itself any more.
    return bool(
        mallopt(_MMAP_THRESHOLD, _WHOLE)
        and mallopt(_TOP_PAD, _STEP)
        and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    )


def give_back_freed_memory() -> bool:
    """Return to the system what is free now, which `keep_freed_memory` holds; False where the C library has no such call.

    For the moment when much is freed for good: the fp32 shards that a network is built in, before its bf16 ones and their
    masters take their place.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    malloc_trim.argtypes, malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    malloc_trim(0)
    return True
