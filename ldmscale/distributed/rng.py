"""Random draws that belong to a sample, not to a rank.

Crop, flip, noise, timestep and caption drop of a sample are functions of (seed, position, purpose), where
position is the sample's number in the endless global sequence. So the same sample gets the same draws on any
number of ranks and workers, in any accumulation, and after any resume.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # inside the functions that need it: login nodes read this module without torch

_WORD = 2**64


def generator(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Returns the generator of one sample's draws for one purpose.

    Philox 4x64 is a counter-based generator: its key is (seed, crc32 of the purpose) and the position fills
    the third word of the counter, which 2**128 draws would have to overflow to reach. Streams of two
    positions therefore never overlap.

    Args:
        seed: the run's seed (any integer; taken modulo 2**64).
        position: number of the sample in the global sequence, at least 0.
        purpose: what the draws are for: "noise", "timestep", "drop", "crop" ...

    Raises:
        ValueError: if the position is negative.
    """
    if position < 0:
        raise ValueError(f"position must be at least 0, got {position}")
    key = np.array([seed % _WORD, zlib.crc32(purpose.encode("utf-8"))], dtype=np.uint64)
    counter = np.array([0, 0, position % _WORD, position // _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def shuffled(count: int, seed: int, number: int, purpose: str) -> np.ndarray:
    """Returns a permutation of range(count) as int64 [count], a pure function of its arguments.

    It sorts raw 64-bit words of the bit generator instead of calling `Generator.permutation`, because numpy
    promises that the raw words stay the same in later versions and does not promise it for what `Generator`
    makes of them: an order of samples must survive an upgrade in the middle of a run.
    """
    words = generator(seed, number, purpose).bit_generator.random_raw(count)
    return np.argsort(np.asarray(words, dtype=np.uint64), kind="stable").astype(np.int64, copy=False)


def normal(seed: int, positions: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 [len(positions), *shape] on the CPU."""
    import torch

    drawn = [
        generator(seed, int(p), purpose).standard_normal(tuple(shape), dtype=np.float32) for p in positions
    ]
    return torch.from_numpy(np.stack(drawn))


def uniform(seed: int, positions: Sequence[int], purpose: str) -> Tensor:
    """Numbers in [0, 1), float64 [len(positions)] on the CPU."""
    import torch

    return torch.tensor([generator(seed, int(p), purpose).random() for p in positions], dtype=torch.float64)


def seed_torch(seed: int, position: int, purpose: str) -> None:
    """Seed PyTorch's own generators for what the operations of a network draw, such as dropout masks.

    Args:
        position: of the first sample of the micro-batch. The draws are the same on any rank, in any accumulation and after
            any resume with micro-batches of the same size.
    """
    import torch

    torch.manual_seed(int(generator(seed, position, purpose).bit_generator.random_raw()) % 2**63)
