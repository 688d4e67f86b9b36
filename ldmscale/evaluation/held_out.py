"""Reconstruction figures of a fixed set of images, by all ranks together.

The images come in fixed batches, numbered over all ranks, and rank r takes batches r, r + world, ... So what a network
is given does not depend on the number of ranks, and neither do the figures of an image. Every rank makes the same number
of calls (the last ones on images that do not count), as networks cut by ZeRO-3 ask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ldmscale.config import DataConfig
from ldmscale.data.images.decode import decode_image, image_member
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import SampleReader
from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import DataError
from ldmscale.evaluation.metrics import mean_psnr, psnr, ssim
from ldmscale.storage.digest import sha256

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
        """Mean of every figure over the images of all ranks, summed in their order. Collective.

        An image that is reconstructed exactly has no finite PSNR: the mean is that of the others, "exact_images" counts them
        where there are any, and "psnr_db" is absent where there are no others.
        """
        rows = sorted(gather_lists(self.rows))
        names = list(rows[0][1]) if rows else []
        means = {name: sum(values[name] for _, values in rows) / len(rows) for name in names}
        if rows:
            means["psnr_db"], exact = mean_psnr([values["psnr_db"] for _, values in rows])
            if exact:
                means["exact_images"] = float(exact)
            if not math.isfinite(means["psnr_db"]):
                del means["psnr_db"]
        return means


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


log = logging.getLogger(__name__)


@dataclass
class ImageSet:
    """The first `count` samples of an index, resized and cropped by the data's settings."""

    index: Mixture
    data: DataConfig
    count: int
    keys: list[tuple[int, str]] = field(default_factory=list)  # of the samples this rank has read
    faults: list[tuple[int, str]] = field(default_factory=list)  # of those it could not read

    def batches(self, batch: int, ranks: Ranks) -> Iterator[NumberedBatch]:
        """This rank's batches, as many as on every other rank; samples that cannot be read are left out and kept count of."""
        reader = SampleReader(self.index)
        for numbers, counts in shares(self.count, batch, ranks.rank, ranks.size):
            read = [
                (number, image) for number in numbers if (image := self._image(reader, number)) is not None
            ]
            if not read:  # a network of ZeRO-3 must be called on every rank
                assert self.data.image_size is not None
                side = self.data.image_size
                read, counts = [(numbers[0], np.zeros((3, side, side), dtype=np.uint8))], False
            images = torch.from_numpy(np.stack([image for _, image in read]))
            yield NumberedBatch(images, tuple(number for number, _ in read), counts)
        reader.close()

    def _image(self, reader: SampleReader, number: int) -> np.ndarray | None:
        starts = np.concatenate([[0], np.cumsum(self.index.counts)])
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        assert self.data.image_size is not None
        try:
            sample = reader.read(shard, number - int(starts[shard]))
            image: np.ndarray = decode_image(
                image_member(sample.members)[1],
                size=self.data.image_size,
                crop="center",
                max_pixels=self.data.max_pixels,
            )
        except DataError as error:
            log.warning("sample %d of %s: %s", number, self.index.shards[shard], error)
            self.faults.append((number, f"{self.index.shards[shard]}: {error}"))
            return None
        self.keys.append((number, f"{self.index.shards[shard].rsplit('/', 1)[-1]}/{sample.key}"))
        return image

    def identity(self) -> tuple[int, str, list[str]]:
        """How many samples all ranks have read, the sha256 of their names in order, and what could not be read. Collective."""
        named = sorted(set(gather_lists(self.keys)))
        faults = [fault for _, fault in sorted(set(gather_lists(self.faults)))]
        return len(named), sha256("\n".join(name for _, name in named)), faults
