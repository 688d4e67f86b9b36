"""Reads a fixed set of images: the first of some shards, in their order, cut into the batches of each rank."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ldmscale.config import DataConfig
from ldmscale.data.decode import decode_image, image_member
from ldmscale.data.mixture import Mixture
from ldmscale.data.samples import SampleReader
from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import DataError
from ldmscale.evaluation.held_out import NumberedBatch, shares

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
        return len(named), hashlib.sha256("\n".join(name for _, name in named).encode()).hexdigest(), faults
