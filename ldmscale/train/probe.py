"""A few numbers that tell a network by what it answers: saved with its weights, and asked for again after a restore."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmscale.errors import CheckpointError

# Of the output's root mean square; other kernels, ranks and orders of addition stay far below, lost weights far above.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
_DIRECTIONS = 6


def summary(output: Tensor) -> list[float]:
    """Root mean square of an output of any shape, and its components along fixed directions of the same length."""
    values = output.detach().double().cpu().flatten()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_DIRECTIONS, values.numel(), generator=generator, dtype=torch.float64)
    return [values.square().mean().sqrt().item(), *(directions @ values / math.sqrt(values.numel())).tolist()]


def verify(saved: Sequence[float], found: Sequence[float], precision: str, checkpoint: object) -> None:
    """Raise CheckpointError if restored weights answer otherwise than the saved ones did."""
    if not all(map(math.isfinite, saved)) or len(saved) != len(found):
        return
    limit = TOLERANCE[precision] * max(saved[0], 1e-6)
    worst = max(abs(one - other) for one, other in zip(saved, found, strict=True))
    if not worst <= limit:
        raise CheckpointError(
            f"{checkpoint} was restored, but the network does not answer as it did when it was saved: its answer to a "
            f"fixed input differs by {worst:.3g}, at most {limit:.3g} is rounding. Go back to the version of ldmscale "
            "and its libraries that wrote it, or to an older checkpoint"
        )
