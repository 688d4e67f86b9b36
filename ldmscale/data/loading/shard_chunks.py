"""Reads and decodes spans of a shard, in order, for those who work through whole shards. The work of loading processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldmscale.data.conditions.record import parse_record
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.reader import Sample, SampleReader
from ldmscale.errors import DataError
from ldmscale.storage.object_store import StoreError


class Span(NamedTuple):
    """Samples of one shard, in order."""

    claim: int  # which of this process's claims it belongs to
    number: int  # of the shard
    start: int
    stop: int
    last: bool


class Row(NamedTuple):
    key: str
    at: int  # in its shard
    caption: str
    metadata: dict[str, Any]
    tokens: np.ndarray | None


@dataclass
class Chunk:
    """A span that was read: uint8 [b,3,H,W] and what stands beside each image."""

    span: Span
    images: Tensor | None  # None: no sample of the span can be used
    rows: list[Row]
    skipped: list[tuple[str, str]]  # key or number, and reason
    unreachable: str = ""  # the store could not be reached


class ChunkReader(Dataset[Chunk]):
    """Reads and decodes spans; goes to the workers."""

    def __init__(self, reader: SampleReader, item: ImageItem) -> None:
        self.reader, self.item = reader, item

    def __getitem__(self, span: Span) -> Chunk:
        chunk = Chunk(span, None, [], [])
        images = []
        for at in range(span.start, span.stop):
            key = f"sample {at}"
            try:
                sample = self.reader.read(span.number, at)
                key = sample.key
                found, metadata = self.item(sample, at), _metadata(sample)
            except StoreError as error:
                chunk.unreachable = str(error)
                return chunk
            except DataError as error:
                chunk.skipped.append((key, str(error)))
                continue
            tokens = found.get("tokens")
            images.append(np.asarray(found["image"]))
            chunk.rows.append(
                Row(key, at, str(found["caption"]), metadata, None if tokens is None else np.asarray(tokens))
            )
        if images:
            chunk.images = torch.from_numpy(np.stack(images))
        return chunk


def _metadata(sample: Sample) -> dict[str, Any]:
    found = parse_record(sample.members.get("json", b"{}"))
    if not isinstance(found, dict):
        raise DataError(f"its json is a {type(found).__name__}, expected an object")
    return found
