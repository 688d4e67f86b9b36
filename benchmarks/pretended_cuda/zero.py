"""Collectives of a step of the 1.45B model behind DeepSpeed on CPU tensors, with pretended ranks.

The network has a tenth of its width and so a hundredth of its elements; every threshold is a hundredth, too: the buckets cut it
at the same places. Elements are given relative to the parameters, which makes them those of the full width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.pretended_cuda import experiment
from benchmarks.pretended_cuda.ranks import PretendedRanks
from ldmscale.builders.networks import BLOCKS, build_denoiser
from ldmscale.models.conditions import Conditions
from ldmscale.train.engine.engine import Engine, EngineOptions, connect, sharded_construction

_NARROWER = 100  # elements of the full network over those of the narrow one
PASSES = ("forward", "backward", "update")


@dataclass(frozen=True)
class Passed:
    """Collectives of one pass, and what it took of this process.

    Attributes:
        name: forward, backward or update.
        calls: per collective.
        elements: per collective, over the number of parameters.
        seconds: processor time of this thread. It depends on the machine; the arithmetic of the narrow network is in it.
    """

    name: str
    calls: dict[str, int]
    elements: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Zero:
    """One window of accumulation, after a first one in which DeepSpeed records the order of modules."""

    stage: int
    ranks: int
    parameters: int
    tensors: int
    modules: int  # with parameters of their own
    passes: list[Passed]  # forward and backward of a micro-step in the middle of the window, and the update
    closing: list[Passed]  # forward and backward of the last micro-step


def measure(
    stage: int,
    *,
    ranks: int = 8,
    checkpointing: str = "off",
    leaf_blocks: bool = False,
    live_elements: float = 1e9,
    accumulation_steps: int = 5,
    overrides: Sequence[str] = experiment.NARROW,
) -> Zero:
    """Two windows of the denoiser at ZeRO-`stage`; the second one is counted. Once per process.

    Args:
        live_elements: ZeRO-3's `zero.live_elements`, of the network in full width.
        overrides: what makes the network narrow.
    """
    torch.set_num_threads(1)
    group = PretendedRanks(ranks, on_device=False)
    connect(torch.device("cpu"))
    config = experiment.diffusion(overrides, checkpointing=checkpointing)
    options = EngineOptions(
        stage,
        "bf16",
        1,
        accumulation_steps=accumulation_steps,
        gradient_clip_norm=1.0,
        persistence_threshold=100_000 // _NARROWER,
        bucket_elements=50_000_000 // _NARROWER,
        prefetch_elements=50_000_000 // _NARROWER,
        live_elements=int(live_elements) // _NARROWER,
        leaf_types=BLOCKS if leaf_blocks else (),
    )
    with sharded_construction(options):
        network = build_denoiser(config)
    engine = Engine("denoiser", network, options, torch.device("cpu"))
    parameters = engine.parameter_count()
    x, t = torch.randn(1, 4, 8, 8).to(engine.compute_dtype), torch.tensor([5])
    text = Conditions(token_ids=torch.zeros(1, 77, dtype=torch.int64))
    kept = torch.zeros(1, dtype=torch.bool)
    passes: list[Passed] = []

    def counted(name: str, began: float) -> None:
        elements = {name: group.elements[name] / parameters for name in group.calls}
        passes.append(Passed(name, dict(group.calls), elements, time.thread_time() - began))
        group.reset()

    micro_steps = []
    group.reset()
    for _ in range(2 * accumulation_steps):
        began = time.thread_time()
        out = engine(x, t, text, kept)
        counted("forward", began)
        began = time.thread_time()
        # Gathers give zeros, and norms of zeros NaN: the loss is finite and has the whole graph behind it.
        engine.backward(torch.nan_to_num(out.float()).square().mean() * 0)
        counted("backward", began)
        began = time.thread_time()
        engine.step()
        counted("update", began)
        micro_steps.append(passes[-3:])
    window = micro_steps[accumulation_steps:]
    middle = [
        Passed(p.name, p.calls, p.elements, statistics.median(m[k].seconds for m in window))
        for k, p in enumerate(window[0])
    ]
    return Zero(
        stage,
        ranks,
        parameters,
        sum(1 for _ in engine.network.parameters()),
        sum(1 for module in engine.network.modules() if any(True for _ in module.parameters(recurse=False))),
        [*middle[:2], window[-1][2]],
        window[-1][:2],
    )
