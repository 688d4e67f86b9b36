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
from ldmscale.data.images.buckets import Shape, bucket_shapes
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


def shares(
    groups: Sequence[Sequence[int]], batch: int, rank: int, world: int
) -> Iterator[tuple[int, Sequence[int], bool]]:
    """This rank's batches of a set: number of the group, numbers of its images, and whether the batch counts.

    A batch is of one group: images of one shape. Every rank has as many batches.
    """
    every = [
        (group, numbers[start : start + batch])
        for group, numbers in enumerate(groups)
        for start in range(0, len(numbers), batch)
    ]
    for turn in range(0, len(every), world):
        mine = turn + rank
        group, numbers = every[mine] if mine < len(every) else every[0]
        yield group, numbers, mine < len(every)


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
    """The first `count` samples of an index, resized and cropped by the data's settings, each in the shape of its bucket."""

    index: Mixture
    data: DataConfig
    count: int
    keys: list[tuple[int, str]] = field(default_factory=list)  # of the samples this rank has read
    faults: list[tuple[int, str]] = field(default_factory=list)  # of those it could not read

    def batches(self, batch: int, ranks: Ranks) -> Iterator[NumberedBatch]:
        """This rank's batches, as many as on every other rank; samples that cannot be read are left out and kept count of."""
        reader, shapes = SampleReader(self.index), self.shapes
        for bucket, numbers, counts in shares(self._by_bucket(), batch, ranks.rank, ranks.size):
            read = [
                (number, image)
                for number in numbers
                if (image := self._image(reader, number, shapes[bucket])) is not None
            ]
            if not read:  # a network of ZeRO-3 must be called on every rank
                width, height = shapes[bucket]
                read, counts = [(numbers[0], np.zeros((3, height, width), dtype=np.uint8))], False
            images = torch.from_numpy(np.stack([image for _, image in read]))
            yield NumberedBatch(images, tuple(number for number, _ in read), counts)
        reader.close()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(width, height) of the aspect-ratio buckets; the square alone without them."""
        data = self.data
        assert data.image_size is not None
        if data.bucket_step is None:
            return ((data.image_size, data.image_size),)
        return bucket_shapes(data.image_size, data.bucket_step, data.bucket_max_ratio)

    def _by_bucket(self) -> list[list[int]]:
        """The numbers of the samples of each bucket. Within a shard they lie bucket by bucket."""
        counts = self.index.bucket_counts
        of_each = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.reshape(-1))
        return [np.flatnonzero(of_each[: self.count] == k).tolist() for k in range(counts.shape[1])]

    def _image(self, reader: SampleReader, number: int, size: Shape) -> np.ndarray | None:
        starts = np.concatenate([[0], np.cumsum(self.index.counts)])
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        try:
            sample = reader.read(shard, number - int(starts[shard]))
            image: np.ndarray = decode_image(
                image_member(sample.members)[1],
                size=size,
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
