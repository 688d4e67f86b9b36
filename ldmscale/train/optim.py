"""Which parameters are decayed.

The published latent diffusion models decay every parameter alike (AdamW's default 0.01), so that is the
default here. Leaving out biases and normalisation weights is an option.
"""

from __future__ import annotations

from typing import Any

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
