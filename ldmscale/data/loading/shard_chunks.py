"""Reads and decodes spans of a shard, in order, for jobs that work through whole shards. Runs in loading processes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldmscale.data.conditions.annotations import caption_in
from ldmscale.data.conditions.record import parse_record
from ldmscale.data.images.decode import image_header, image_member, view_of
from ldmscale.data.latents.sample_record import SampleView
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.reader import Sample, SampleReader
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.errors import DataError
from ldmscale.storage.object_store import StoreError


class Span(NamedTuple):
    """Samples of one shard, in order."""

    claim: int  # which of this process's claims it belongs to
    number: int  # of the shard
    start: int
    stop: int
    last: bool
    bucket: int = 0


class Row(NamedTuple):
    key: str
    at: int  # in its shard
    caption: str
    metadata: dict[str, Any]
    tokens: np.ndarray | None
    view: SampleView
    captions: dict[str, str]  # of the text members
    text_ids: np.ndarray | None = None  # int64 [L], for the frozen text encoder
    text_tokens: int | None = None  # of them without the padding


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

    def __init__(
        self, reader: SampleReader, item: ImageItem, text_tokenizer: EncoderTokenizer | None = None
    ) -> None:
        self.reader, self.item, self.text_tokenizer = reader, item, text_tokenizer

    def __getitem__(self, span: Span) -> Chunk:
        chunk = Chunk(span, None, [], [])
        images = []
        for at in range(span.start, span.stop):
            key = f"sample {at}"
            try:
                sample = self.reader.read(span.number, at, span.bucket)
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
                Row(
                    key,
                    at,
                    str(found["caption"]),
                    metadata,
                    None if tokens is None else np.asarray(tokens),
                    self._view(sample),
                    _captions(sample),
                )
            )
        if self.text_tokenizer is not None and chunk.rows:
            captions = [row.caption for row in chunk.rows]
            ids, lengths = self.text_tokenizer.encode(captions), self.text_tokenizer.lengths(captions)
            chunk.rows = [
                row._replace(text_ids=of_row, text_tokens=length)
                for row, of_row, length in zip(chunk.rows, ids, lengths, strict=True)
            ]
        if images:
            chunk.images = torch.from_numpy(np.stack(images))
        return chunk

    def _view(self, sample: Sample) -> SampleView:
        """Which part of the image its item shows. The item is made: the image can be read."""
        header = image_header(image_member(sample.members)[1], max_pixels=self.item.max_pixels)
        _, height, width = self.item.shape(sample.bucket)
        part = view_of(header.width, header.height, (width, height), self.item.crop)
        return SampleView(
            (header.width, header.height), (part.left, part.top), (part.width, part.height), (width, height)
        )


def _captions(sample: Sample) -> dict[str, str]:
    """Of all text members, by their extensions; those that are no text are left out."""
    found = {}
    for name, data in sample.members.items():
        if name in ("txt", "caption", "text") or name.endswith(".txt"):
            with suppress(DataError):
                found[name] = caption_in(data)
    return found


def _metadata(sample: Sample) -> dict[str, Any]:
    found = parse_record(sample.members.get("json", b"{}"))
    if not isinstance(found, dict):
        raise DataError(f"its json is a {type(found).__name__}, expected an object")
    return found
