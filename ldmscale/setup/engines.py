"""Options, attention, averages and learning rates of the engines, from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ldmscale.builders.attention import AttentionChoice, choose_attention, wanted_attention
from ldmscale.builders.networks import BLOCKS
from ldmscale.config import EmaConfig, OptimConfig, TrainConfig, ZeroConfig
from ldmscale.setup.run import Run
from ldmscale.train.engine.ema import PowerEma, ShardedEma, decay_kind
from ldmscale.train.engine.engine import Engine
from ldmscale.train.engine.options import EngineOptions, learning_rate


def set_attention(
    run: Run, train: TrainConfig, head_channels: Mapping[torch.dtype, Sequence[int]]
) -> AttentionChoice:
    """Choose the attention backend of this process and note it in run.json. Collective."""
    choice = choose_attention(wanted_attention(train), head_channels, run.device)
    run.note("attention", choice.plain())
    return choice


def engine_options(
    run: Run, train: TrainConfig, optim: OptimConfig, zero: ZeroConfig, lr_scale: float = 1.0
) -> EngineOptions:
    """DeepSpeed's side of the configuration."""
    return EngineOptions(
        zero_stage=zero.stage,
        precision=train.precision,
        rank_micro_batch=train.rank_micro_batch,
        accumulation_steps=run.accumulation_steps,
        gradient_clip_norm=optim.gradient_clip_norm,
        optimizer=optim.kind,
        learning_rate=optim.rate(train.global_batch) * lr_scale,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        persistence_threshold=zero.persistence_threshold,
        bucket_elements=zero.bucket_elements,
        prefetch_elements=zero.prefetch_elements,
        live_elements=zero.live_elements,
        leaf_types=BLOCKS if zero.leaf_blocks else (),
        overlap_communication=zero.overlap_communication and run.device.type == "cuda",
    )


def averages_of(engine: Engine, config: EmaConfig) -> list[ShardedEma]:
    """The averages of a network's weights, the main one first."""
    if not config.enabled:
        return []
    kept = [ShardedEma(engine.masters, config.decay, warmup=config.warmup)]
    kept += [
        ShardedEma(engine.masters, decay, warmup=config.warmup, kind=decay_kind(decay))
        for decay in config.decays
    ]
    return kept + [PowerEma(engine.masters, width) for width in config.power_widths]


def rate_curve(optim: OptimConfig, train: TrainConfig, scale: float = 1.0) -> Callable[[int], float]:
    """The learning rate as a function of the finished steps."""

    def rate(step: int) -> float:
        return learning_rate(
            step,
            base=optim.rate(train.global_batch) * scale,
            curve=optim.curve,
            warmup_steps=optim.warmup_steps,
            total_steps=train.max_steps,
            final_share=optim.final_lr_share,
        )

    return rate
