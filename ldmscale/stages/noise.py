"""Random numbers of training samples: a function of the seed and the sample's position, never of rank or batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldmscale.distributed.rng import generator


def normal(seed: int, positions: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 [len(positions), *shape] on the CPU."""
    drawn = [
        generator(seed, int(p), purpose).standard_normal(tuple(shape), dtype=np.float32) for p in positions
    ]
    return torch.from_numpy(np.stack(drawn))


def uniform(seed: int, positions: Sequence[int], purpose: str) -> Tensor:
    """Numbers in [0, 1), float64 [len(positions)] on the CPU."""
    return torch.tensor([generator(seed, int(p), purpose).random() for p in positions], dtype=torch.float64)
