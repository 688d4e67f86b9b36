"""Random numbers of training that are made with the batch: by the loader's workers, in page-locked memory on a GPU run.

They are functions of (seed, position, purpose) alone, so every process that makes them gets the same numbers. A batch that was made
without them is no different: what reads it draws them itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldmscale.distributed import rng

_PREFIX = "draw/"


@dataclass(frozen=True)
class BatchDraws:
    """What is drawn for every batch.

    Attributes:
        seed: of the run.
        channels: of the latents.
        factor: image pixels per latent position, in height and width.
        normal: purposes of normal numbers of the latents' shape, such as "noise".
        per_channel: purposes of one normal number per channel.
        uniform: purposes of one number in [0, 1).
    """

    seed: int
    channels: int
    factor: int
    normal: tuple[str, ...] = ()
    per_channel: tuple[str, ...] = ()
    uniform: tuple[str, ...] = ()

    def bytes_of_sample(self, positions: int) -> int:
        """Bytes of the normal numbers for a latent of `positions` pixels."""
        return 4 * self.channels * positions * len(self.normal)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The fields to add to a batch of images [B,3,H,W] or of latents [B,*,h,w]."""
        positions = batch["position"].tolist()
        if "latent" in batch:
            height, width = batch["latent"].shape[-2:]
        else:
            height, width = (side // self.factor for side in batch["image"].shape[-2:])
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.normal, (self.channels, height, width))
        shapes |= dict.fromkeys(self.per_channel, (self.channels, 1, 1))
        made = {
            f"{_PREFIX}{name}": rng.normal(self.seed, positions, name, shape)
            for name, shape in shapes.items()
        }
        for name in self.uniform:
            made[f"{_PREFIX}{name}"] = rng.uniform(self.seed, positions, name)
        return made


class Draws:
    """The random numbers of one batch: those that came with it, else drawn when they are asked for. On the CPU."""

    def __init__(self, seed: int, positions: Sequence[int], batch: Mapping[str, Any] | None = None) -> None:
        self.seed, self.positions, self._batch = seed, positions, batch or {}

    @classmethod
    def of(cls, batch: Mapping[str, Any], seed: int) -> Draws:
        return cls(seed, batch["position"].tolist(), batch)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 [B, *shape]."""
        made: Tensor | None = self._batch.get(_PREFIX + purpose)
        if made is None:
            return rng.normal(self.seed, self.positions, purpose, shape)
        if tuple(made.shape[1:]) != tuple(shape):
            raise ValueError(
                f"the batch brings {purpose!r} of shape {tuple(made.shape[1:])}, and {tuple(shape)} is needed"
            )
        return made

    def uniform(self, purpose: str) -> Tensor:
        """Numbers in [0, 1), float64 [B]."""
        made: Tensor | None = self._batch.get(_PREFIX + purpose)
        return rng.uniform(self.seed, self.positions, purpose) if made is None else made
