"""What a rank holds of a trained network, counted from the tensors themselves, and what theory says it holds.

ZeRO (Rajbhandari et al. 2020, section 5): of P parameters on W ranks stage 1 shards the optimiser's states, stage 2 the
gradients, too, and stage 3 the weights, too. In bf16 the states include an fp32 master of each weight, and gradients are
accumulated in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.train.engine import Engine


@dataclass(frozen=True)
class Held:
    """Bytes on one rank."""

    weights: int  # as the forward pass sees them
    gradients: int
    states: int  # fp32 masters (where they are not the weights themselves) and the optimiser's moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states


def measured(engine: Engine) -> Held:
    """Bytes of the tensors that the engine holds now: within `rehearsal`, or before an update, also of gradients."""
    seen: set[int] = set()
    weights = _bytes(engine.weights(), seen)
    gradients = _bytes(engine.gradients(), seen)
    moments = (
        v for state in engine.base_optimizer.state.values() for v in state.values() if torch.is_tensor(v)
    )
    return Held(weights, gradients, _bytes([*engine.masters, *moments], seen))


def expected(parameters: int, ranks: int, stage: int, precision: str, moments: int = 2) -> Held:
    """Theory's bytes on one rank; `moments` of the optimiser: 2 for AdamW, 0 for SGD."""
    weight = 2 if precision == "bf16" else 4
    weights = weight * parameters / (ranks if stage == 3 else 1)
    gradients = 4 * parameters / (ranks if stage >= 2 else 1)
    # The fp32 weights of stages 0 and 3 are their own masters.
    own_masters = precision == "bf16" or stage in (1, 2)
    states = 4 * parameters * (moments + own_masters) / (ranks if stage >= 1 else 1)
    return Held(round(weights), round(gradients), round(states))


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of the storages behind the tensors, each once."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
