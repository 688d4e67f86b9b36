"""Which parameters are decayed.

The published latent diffusion models decay every parameter alike (AdamW's default 0.01), so that is the
default here. Leaving out biases and normalisation weights is an option.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn


def _dimensions(parameter: nn.Parameter) -> int:
    # A parameter that ZeRO-3 has partitioned looks empty and one-dimensional; its true shape is `ds_shape`.
    return len(getattr(parameter, "ds_shape", parameter.shape))


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
        {"params": [p for p in trained if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if _dimensions(p) < 2], "weight_decay": 0.0},
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
