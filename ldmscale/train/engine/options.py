"""Options of an engine, and what is made of them: DeepSpeed's configuration, parameter groups, learning rates.

The published latent diffusion models decay every parameter alike (AdamW's default 0.01), so that is the default here.
Leaving out biases and normalisation weights is an option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ldmscale.train.engine.deepspeed_internals import whole_shape


@dataclass(frozen=True)
class EngineOptions:
    """What the engine needs to know, as plain values."""

    zero_stage: int  # 0..3
    precision: str  # "bf16" (fp32 masters, states and gradient reduction) or "fp32"
    rank_micro_batch: int  # samples a rank takes through one forward pass
    accumulation_steps: int = 1  # forward passes an update
    gradient_clip_norm: float | None = (
        None  # global norm; None: no clipping, the norm is measured all the same
    )
    optimizer: str = "adamw"  # or "sgd": without momentum, and so without any state
    learning_rate: float = 1e-4  # of the first update, until set_learning_rate says otherwise
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_vectors: bool = True  # False: biases and normalisation weights are not decayed
    persistence_threshold: int = 100_000  # ZeRO-3: parameters of fewer elements stay whole on every rank
    bucket_elements: int = 50_000_000  # elements reduced, or gathered, at a time
    prefetch_elements: int = 50_000_000  # ZeRO-3: elements fetched ahead of use
    live_elements: int = 1_000_000_000  # ZeRO-3: elements of gathered weights that stay for their next use
    leaf_types: tuple[type[nn.Module], ...] = ()  # ZeRO-3: modules of these types are gathered as a whole
    overlap_communication: bool = False  # with the backward pass; needs CUDA streams to gain anything

    @property
    def compute_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]


def deepspeed_json(options: EngineOptions, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, at ZeRO-1 to 3. The one place that knows its keys."""
    half = options.precision == "bf16"
    adam: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": list(options.betas),
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        # torch's own: on flat partitions it is as fast as DeepSpeed's, which every node would have to compile.
        "torch_adam": True,
        "fused": True,
    }
    sgd = {"type": "SGD", "params": {key: adam[key] for key in ("lr", "weight_decay")}}
    config: dict[str, Any] = {
        "train_batch_size": options.rank_micro_batch * options.accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": options.rank_micro_batch,
        "gradient_accumulation_steps": options.accumulation_steps,
        "gradient_clipping": options.gradient_clip_norm or 0.0,
        "optimizer": {"type": "AdamW", "params": adam} if options.optimizer == "adamw" else sgd,
        "zero_allow_untested_optimizer": options.optimizer != "adamw",
        "bf16": {"enabled": half},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": options.zero_stage,
            "overlap_comm": options.overlap_communication,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": options.bucket_elements,
            "allgather_bucket_size": options.bucket_elements,
        },
    }
    if options.zero_stage == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": options.persistence_threshold,
            "stage3_prefetch_bucket_size": options.prefetch_elements,
            # The one bounds what is gathered ahead, the other what is kept when it was used.
            "stage3_max_live_parameters": options.live_elements,
            "stage3_max_reuse_distance": options.live_elements,
        }
    if half:
        config["communication_data_type"] = "fp32"
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def parameter_groups(
    network: nn.Module, weight_decay: float, *, decay_vectors: bool = True
) -> list[dict[str, Any]]:
    """The trained parameters of a network in groups of equal weight decay, in their own order.

    With `decay_vectors=False` parameters of fewer than two dimensions (biases, weights of normalisations) are
    not decayed. Frozen parameters are in no group; empty groups are left out.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if decay_vectors or weight_decay == 0.0:
        return [{"params": trained, "weight_decay": weight_decay}]
    groups = [
        {"params": [p for p in trained if len(whole_shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(whole_shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


Curve = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int,
    *,
    base: float,
    curve: Curve = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
    final_share: float = 0.0,
) -> float:
    """The rate of update number `step` (0 for the first one).

    The rate climbs linearly over the first `warmup_steps` updates, the first of them at base / warmup_steps
    and number `warmup_steps` - 1 at the full base. Then it stays ("constant"), or falls to base * final_share
    at update `total_steps` along a straight line or half a cosine, and stays there. `total_steps` counts the
    warm-up and is not used by "constant".
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if curve == "constant":
        return base
    span = total_steps - warmup_steps
    done = min(1.0, (step - warmup_steps) / span) if span > 0 else 1.0
    if curve == "linear":
        share = 1.0 - done
    elif curve == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        raise ValueError(f"learning-rate curve {curve!r}: expected constant, linear or cosine")
    return base * (final_share + (1.0 - final_share) * share)
