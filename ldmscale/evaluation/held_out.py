"""Reconstruction figures of a fixed set of images, by all ranks together.

The images come in fixed batches, numbered over all ranks, and rank r takes batches r, r + world, ... So what a network
is given does not depend on the number of ranks, and neither do the figures of an image. Every rank makes the same number
of calls (the last ones on images that do not count), as networks cut by ZeRO-3 ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists
from ldmscale.evaluation.reconstruction import psnr, ssim

Distance = Callable[[Tensor, Tensor], Tensor]  # two images [B,3,H,W] in [-1,1] -> [B]


@dataclass(frozen=True)
class NumberedBatch:
    """Images of the fixed set; `numbers` are their places in it. `counts`: False for a rank without work of its own."""

    images: Tensor  # uint8 [B,3,H,W]
    numbers: tuple[int, ...]
    counts: bool = True


def shares(count: int, batch: int, rank: int, world: int) -> Iterator[tuple[range, bool]]:
    """This rank's batches of a set of `count`, as ranges, and whether they count. As many on every rank."""
    starts = list(range(0, count, batch))
    for turn in range(0, len(starts), world):
        mine = turn + rank
        start = starts[mine] if mine < len(starts) else starts[0]
        yield range(start, min(start + batch, count)), mine < len(starts)


class ReconstructionScores:
    """Figures of each image, gathered batch by batch."""

    def __init__(self, distance: Distance | None) -> None:
        self.distance = distance
        self.rows: list[tuple[int, dict[str, float]]] = []

    @torch.no_grad()
    def add(self, numbers: Sequence[int], images: Tensor, reconstructions: Tensor) -> None:
        """Both float [B,3,H,W]; images in [-1,1]."""
        found = {"psnr_db": psnr(images, reconstructions), "ssim": ssim(images, reconstructions)}
        if self.distance is not None:
            found["perceptual"] = self.distance(images, reconstructions.float().clamp(-1, 1))
        for at, number in enumerate(numbers):
            self.rows.append((number, {name: float(values[at]) for name, values in found.items()}))

    def means(self) -> dict[str, float]:
        """Mean of every figure over the images of all ranks, summed in their order. Collective."""
        rows = sorted(gather_lists(self.rows))
        names = list(rows[0][1]) if rows else []
        return {name: sum(values[name] for _, values in rows) / len(rows) for name in names}


class HeldOut:
    """What a training run is measured on, kept in memory."""

    def __init__(
        self, batches: Sequence[NumberedBatch], distance: Distance | None, device: torch.device
    ) -> None:
        self.batches, self.distance, self.device = batches, distance, device

    def measure(self, reconstruct: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the set. `reconstruct` takes and gives float [B,3,H,W]; it is called equally often on all ranks."""
        scores = ReconstructionScores(self.distance)
        for batch in self.batches:
            images = batch.images.to(self.device).float() / 127.5 - 1
            made = reconstruct(images).float()
            if batch.counts:
                scores.add(batch.numbers, images, made)
        return scores.means()
