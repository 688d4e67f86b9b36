"""ldmscale's engine behind the real DeepSpeed with its CUDA accelerator, on pretended CUDA, as one of several pretended ranks.

It counts what ZeRO costs per micro-step and per update: collectives, waits of the host, streams, kernels; and finds CPU tensors
that would go over NCCL. Device, types and calls are those of a GPU run; values do not exist.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.pretended_cuda import experiment
from benchmarks.pretended_cuda.counters import WAIT, Totals
from benchmarks.pretended_cuda.mode import CUDA, PretendedCuda
from benchmarks.pretended_cuda.networks import default_dtype
from benchmarks.pretended_cuda.ranks import PretendedRanks
from benchmarks.pretended_cuda.streams import WAITS, pretend_streams
from ldmscale.builders.networks import BLOCKS, build_denoiser
from ldmscale.models.conditions import Conditions
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine, EngineOptions, connect, sharded_construction


@dataclass(frozen=True)
class Part:
    """One part of a window of two micro-steps."""

    name: str
    totals: Totals
    collectives: dict[str, int]
    elements: dict[str, int]  # per collective
    stream_calls: dict[str, int]
    host_tensors: list[str]  # CPU tensors over NCCL: faults

    @property
    def waits(self) -> int:
        """Of the host for the device, by values read and by synchronisation."""
        return self.totals.notes[WAIT] + sum(self.stream_calls.get(name, 0) for name in WAITS)


@dataclass(frozen=True)
class Sharded:
    stage: int
    ranks: int
    parameters: int
    accelerator: str  # DeepSpeed's
    masters: list[str]  # "dtype on device", each once
    parts: list[Part]


def measure(
    stage: int,
    batch: int = 2,
    *,
    ranks: int = 8,
    small: bool = True,
    leaf_blocks: bool = False,
    checkpointing: str = "off",
    overrides: Sequence[str] = (),
) -> Sharded:
    """The second window of the denoiser at ZeRO-`stage` (1 to 3): two micro-steps and an update. Once per process.

    Args:
        batch: samples per rank.
        small: a narrow network of two levels; the widths of the 1.45B model take minutes.
        leaf_blocks: gather whole blocks at ZeRO-3.
    """
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "DS_ACCELERATOR": "cuda",
    }
    stream_calls = pretend_streams(ranks)
    group = PretendedRanks(ranks, on_device=True)
    # ZeRO-2 reads "has a gradient overflowed" as a number.
    with PretendedCuda(scalar=0.0 if stage == 2 else 1.0) as gpu:
        torch.cuda.synchronize = lambda *_: stream_calls.update(
            ["device.synchronize"]
        )  # the context notes it otherwise
        connect(CUDA)
        _skip_comparison_of_values()
        config = experiment.diffusion(
            [*(experiment.SMALL if small else ()), *overrides], checkpointing=checkpointing
        )
        options = EngineOptions(
            stage,
            "bf16",
            batch,
            accumulation_steps=2,
            gradient_clip_norm=1.0,
            persistence_threshold=1000 if small else 100_000,
            leaf_types=BLOCKS if leaf_blocks else (),
            overlap_communication=True,
        )
        if stage == 3:
            with sharded_construction(options):
                network = build_denoiser(config)
        else:
            with default_dtype(torch.bfloat16), torch.device(CUDA):
                network = build_denoiser(config)
            setattr(network, "to", lambda *_, **__: network)  # noqa: B010
        network.null_token_ids = torch.zeros(77, dtype=torch.int64, device=CUDA)
        engine = Engine("denoiser", network, options, CUDA)
        average = ShardedEma(engine.masters, 0.999)
        x = torch.randn(batch, 4, 32, 32, device=CUDA, dtype=torch.bfloat16)
        t = torch.zeros(batch, dtype=torch.int64, device=CUDA)
        text = Conditions(token_ids=torch.zeros(batch, 77, dtype=torch.int64, device=CUDA))
        kept = torch.zeros(batch, dtype=torch.bool, device=CUDA)
        parts: list[Part] = []

        def part(name: str, work: Callable[[], Any]) -> None:
            gpu.counters.reset()
            group.reset()
            stream_calls.clear()
            work()
            parts.append(
                Part(
                    name,
                    gpu.counters.totals(),
                    dict(group.calls),
                    dict(group.elements),
                    dict(stream_calls),
                    list(group.host_tensors),
                )
            )

        def micro_step() -> None:
            engine.backward(engine(x, t, text, kept).float().square().mean())

        def update() -> None:
            if engine.step():
                average.update()

        for number in range(4):
            part(f"micro-step {number % 2 + 1} of 2", micro_step)
            part("update" if number % 2 else "no update", update)

        def averaged() -> None:
            with engine.averaged_weights(average), torch.no_grad():
                engine.network(x, t, text, None)

        part("averaged weights, one forward pass", averaged)
        masters = sorted({f"{str(m.dtype).removeprefix('torch.')} on {m.device}" for m in engine.masters})
        return Sharded(stage, ranks, engine.parameter_count(), _accelerator(), masters, parts[4:])


def _skip_comparison_of_values() -> None:
    """DeepSpeed compares the order of modules between ranks by value, of which there is none."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None


def _accelerator() -> str:
    from deepspeed.accelerator import get_accelerator

    name: str = get_accelerator().device_name()
    return name
