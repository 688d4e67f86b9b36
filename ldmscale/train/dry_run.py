"""The dry run: one micro-batch forward and backward before the first step, so that missing memory shows at once.

All shapes of a run are fixed, so one micro-batch with every network active is the largest there is. It changes
nothing: gradients are discarded, and buffers, counters and random states are restored.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists
from ldmscale.errors import ConfigError
from ldmscale.tracking.throughput import memory_peaks
from ldmscale.train.engine.engine import Engine
from ldmscale.train.stage import Batch, Stage

log = logging.getLogger(__name__)

_GIB = 2**30


def rehearse(stage: Stage, batch: Batch, step: int) -> None:
    """Run one micro-batch as at `step`, without an update. Collective.

    Raises ConfigError where it does not fit into memory.
    """
    began = time.perf_counter()
    random_state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        with ExitStack() as rehearsals:
            for name in stage.active(step):
                rehearsals.enter_context(stage.engines[name].rehearsal())
            stage.micro_step(batch, step)
            memory = _memory_line(stage, step)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        peaks = ", ".join(f"{name} {value:.1f}" for name, value in memory_peaks(_device(stage)).items())
        raise ConfigError(
            f"a micro-batch of {len(batch['key'])} samples does not fit into memory ({str(error).splitlines()[0]}; "
            f"{peaks}): give a smaller train.rank_micro_batch, unet.checkpointing=full (or autoencoder.checkpointing), "
            "zero=3, or more ranks"
        ) from error
    finally:
        torch.set_rng_state(random_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
    log.info(
        "a dry run of one micro-batch went well in %.1f s; GiB held / in theory:", time.perf_counter() - began
    )
    for line in gather_lists([memory]):
        log.info("  %s", line)


def _memory_line(stage: Stage, step: int) -> str:
    """The memory of each network on this rank while it has gradients, measured and in theory, and the peak."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = []
    for name in stage.active(step):
        engine = stage.engines[name]
        options, held = engine.options, measured(engine)
        # AdamW makes its moments in the first update: before that theory expects none.
        moments = 2 if options.optimizer == "adamw" and engine.updates else 0
        theory = expected(engine.parameter_count(), ranks, options.zero_stage, options.precision, moments)
        parts.append(
            f"{name}: weights {held.weights / _GIB:.2f} / {theory.weights / _GIB:.2f}, "
            f"gradients {held.gradients / _GIB:.2f} / {theory.gradients / _GIB:.2f}, "
            f"masters and moments {held.states / _GIB:.2f} / {theory.states / _GIB:.2f}, "
            f"together {held.total / _GIB:.2f} / {theory.total / _GIB:.2f}"
        )
    peaks = ", ".join(f"{name} {value:.2f}" for name, value in memory_peaks(_device(stage)).items())
    return f"rank {rank}: {'; '.join(parts)}; {peaks}"


# Libraries that allocate for themselves report it as errors of other types: torch's allocator on a CPU, CUDA, cuBLAS,
# cuDNN, NCCL.
_FULL = re.compile(
    r"can't allocate memory|out of memory|cudaErrorMemoryAllocation|CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED|CUFFT_ALLOC_FAILED",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's or the host's memory is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(_FULL.search(str(error)))


def _device(stage: Stage) -> torch.device:
    return next(iter(stage.engines.values())).device


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes on one rank."""

    weights: int  # as the forward pass sees them
    gradients: int
    states: int  # fp32 masters (where they are not the weights themselves) and the optimiser's moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states


def measured(engine: Engine) -> MemoryUsage:
    """Bytes of the tensors that the engine holds now: within `rehearsal`, or before an update, also of gradients."""
    seen: set[int] = set()
    weights = _bytes(engine.weights(), seen)
    gradients = _bytes(engine.gradients(), seen)
    moments = (
        v for state in engine.base_optimizer.state.values() for v in state.values() if torch.is_tensor(v)
    )
    return MemoryUsage(weights, gradients, _bytes([*engine.masters, *moments], seen))


def expected(parameters: int, ranks: int, stage: int, precision: str, moments: int = 2) -> MemoryUsage:
    """Theory's bytes on one rank; `moments` of the optimiser: 2 for AdamW, 0 for SGD."""
    weight = 2 if precision == "bf16" else 4
    weights = weight * parameters / (ranks if stage == 3 else 1)
    gradients = 4 * parameters / (ranks if stage >= 2 else 1)
    # The fp32 weights of stages 0 and 3 are their own masters.
    own_masters = precision == "bf16" or stage in (1, 2)
    states = 4 * parameters * (moments + own_masters) / (ranks if stage >= 1 else 1)
    return MemoryUsage(round(weights), round(gradients), round(states))


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of the storages behind the tensors, each once."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
