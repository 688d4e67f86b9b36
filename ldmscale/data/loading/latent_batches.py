"""Micro-batches of latents, read and verified by the batch.

A sample of latents is a few small members, one of them an array of fixed size; parsing its headers one by one in Python
takes ten times as long as reading it. So the samples of a batch are read into one buffer, and their headers compared with
the set's `latent_layout` at once. Whatever does not match, or is not finite, or cannot be read, is left to the careful
way, `Fetcher.fetch`, which reads it after all or says why not. So values, order, stand-ins and ledger are the same either
way.

Shards are read, not mapped: a mapped file that is cut, or whose disk fails, ends the process by a signal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ldmscale.data.conditions.annotations import caption_in, caption_member
from ldmscale.data.images.decode import LATENT
from ldmscale.data.latents.format import to_stored
from ldmscale.data.loading.fetch import Fetched, Fetcher, Run
from ldmscale.data.loading.latent_spans import NPY_HEAD, Found, Layout, layout_of, matching
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.shards.reader import OPEN_FILES
from ldmscale.data.shards.tar import BLOCK
from ldmscale.errors import DataError

SKIPPED = "skipped"
"""In a batch: how many samples were passed over for each of its own."""

_LONGEST_SPAN = 1 << 24  # bytes of a sample
# What holds the bits, and those of infinity; uint16 are bfloat16's.
_BITS = {"float16": ("int16", 0x7C00), "uint16": ("int16", 0x7F80), "float32": ("int32", 0x7F800000)}


class LatentReader:
    """Reads the latents of tickets as one batch. For local shards.

    Args:
        fetcher: reads what must be read with care; its item is a `LatentItem`.
        item: the same.
    """

    def __init__(self, fetcher: Fetcher[Any], item: LatentItem) -> None:
        self.fetcher, self.item = fetcher, item
        self.careful = 0  # samples that did not go by the batch
        self._memory, self._memory_of_texts = BatchMemory(), BatchMemory()
        self._names = ["key"]
        if item.caption_source is not None:
            self._names.append("caption")
        if item.labels is not None:
            self._names.append("label")
        if item.layout is not None:
            self._names.append("tokens")
        self._layouts: dict[int, Layout | None] = {}  # of each bucket
        self._buffer = np.empty((0, 0), dtype=np.uint8)
        self._rows: list[memoryview] = []

    def read(self, run: Run) -> dict[str, Any]:
        """Reads a micro-batch.

        Returns:
            "latent" [b, *stored_shape_of(bucket)] in the stored dtype, "key", "position" int64 [b], SKIPPED int64 [b], and what the
            item adds: "caption", "tokens" int64 [b, max_tokens], "label" int64 [b].

        Raises:
            DataError: as `Fetcher.fetch`.
        """
        form = self.item.format
        shape = form.stored_shape_of(run.bucket)
        latents = self._memory.take((run.samples, *shape), form.stored_type)
        columns: dict[str, list[Any]] = {name: [None] * run.samples for name in self._names}
        texts = self._texts(run.samples)
        good = self._by_batch(run, latents, texts, columns)
        skipped = torch.zeros(run.samples, dtype=torch.int64)
        upcast: list[tuple[int, np.ndarray]] = []
        for row in np.flatnonzero(~good).tolist():
            self.careful += 1
            fetched: Fetched[Any] = self.fetcher.fetch(run.ticket(row))
            skipped[row] = fetched.skipped
            for name in self._names:
                columns[name][row] = fetched.key if name == "key" else fetched.item[name]
            if texts is not None and self.item.text is not None:
                texts[row] = to_stored(
                    fetched.item["text"], self.item.text.dtype
                )  # exact: it was read of these bits
            latent = fetched.item["latent"]
            if form.dtype == "bfloat16":
                latents[row] = to_stored(latent, "bfloat16")  # exact: it was read of these bits
            elif latent.dtype == latents.dtype:
                latents[row] = latent
            else:
                upcast.append((row, latent))
        if upcast:  # arrays of another dtype than the set's; float32 holds both
            latents = latents.astype(np.float32)
            for row, latent in upcast:
                latents[row] = latent
        values = torch.from_numpy(latents)
        batch: dict[str, Any] = {
            "latent": values.view(torch.bfloat16) if latents.dtype == np.uint16 else values,
            "position": torch.arange(run.position, run.position + run.samples),
            SKIPPED: skipped,
            **columns,
        }
        if texts is not None:
            encoded = torch.from_numpy(texts)
            batch["text"] = encoded.view(torch.bfloat16) if texts.dtype == np.uint16 else encoded
        if "caption" in columns and self.item.tokenizer is not None:
            batch["tokens"] = torch.from_numpy(self.item.tokenizer.encode(columns["caption"]))
        if "tokens" in columns:
            batch["tokens"] = torch.from_numpy(np.stack(columns["tokens"]))
        if "label" in columns:
            batch["label"] = torch.tensor(columns["label"], dtype=torch.int64)
        return batch

    def _texts(self, samples: int) -> np.ndarray | None:
        """Room for the text encodings, where the item reads them."""
        form = self.item.text
        if form is None:
            return None
        return self._memory_of_texts.take((samples, form.max_tokens, form.width), form.stored_type)

    def _by_batch(
        self, run: Run, latents: np.ndarray, texts: np.ndarray | None, columns: dict[str, list[Any]]
    ) -> np.ndarray:
        """Fills in rows of all; says which, bool [b]. The others must be read with care."""
        count = run.samples
        shards, indices = self.fetcher.sequence.places(run.bucket, run.number, count)
        offsets, sizes = self.fetcher.reader.index.spans(shards, indices)
        layout, begins = self._layouts.get(run.bucket), None
        if layout is not None:
            chosen = self._chosen(run, layout)
            if layout.arrays_first and (chosen >= 0).all():
                begins = layout.values_at(chosen)
        good = self._fill(shards, offsets, sizes, latents, begins)
        if not good.any():
            return good
        if layout is None:
            layout = self._learn(run.bucket, good, sizes)
            if layout is None:
                return np.zeros(count, dtype=bool)
            chosen = self._chosen(run, layout)
        found = matching(layout, self._buffer[:count].reshape(count, -1, BLOCK), sizes)
        if not (good & found.good).any():
            self._learn(run.bucket, good, sizes)
            return np.zeros(count, dtype=bool)
        good &= found.good
        if begins is None:
            self._copy(latents, chosen, found.at, good)
        if not _all_finite(latents):
            good &= [_all_finite(latent) for latent in latents]
        if texts is not None and layout.text is not None:
            self._copy(texts, np.full(count, layout.text), found.at, good)
            if not _all_finite(texts):
                good &= [_all_finite(text) for text in texts]
        columns["key"] = found.key_texts()
        if len(columns) > 1:
            self._tell(layout, found, columns, good, run)
        return good

    def _chosen(self, run: Run, layout: Layout) -> np.ndarray:
        """Which member's array is the latent of each sample, int64 [b]; -1: none."""
        if not self.item.flip:
            return np.full(run.samples, layout.arrays.get(LATENT, -1))
        views = [self.item.member(position) for position in range(run.position, run.position + run.samples)]
        return np.array([layout.arrays.get(view, -1) for view in views])

    def _fill(
        self,
        shards: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        latents: np.ndarray,
        begins: np.ndarray | None,
    ) -> np.ndarray:
        """Reads each sample's span into a row of the buffer. Returns which came whole, bool [b].

        Where `begins` [b] says where the values are, these go to `latents` and leave a hole in the buffer.
        """
        count, longest = len(shards), -(-int(sizes.max()) // BLOCK) * BLOCK
        good = np.zeros(count, dtype=bool)
        if longest > _LONGEST_SPAN:
            return good
        if self._buffer.shape[0] < count or self._buffer.shape[1] < longest:
            self._buffer = np.zeros((count, longest), dtype=np.uint8)
            self._rows = [row.data for row in self._buffer]
        came: list[int] = []
        read, values = os.preadv, latents.reshape(-1).view(np.uint8).data
        wide = len(values) // count
        handles, starts = self._handles(shards.tolist()), None if begins is None else begins.tolist()
        for number, (row, handle, offset, size) in enumerate(
            zip(self._rows, handles, offsets.tolist(), sizes.tolist())  # noqa: B905  the buffer may be longer
        ):
            parts = [row[:size]]
            if starts is not None:
                begin, to = starts[number], number * wide
                parts = [row[:begin], values[to : to + wide], row[begin + wide : size]]
            try:
                came.append(read(handle, parts, offset))
            except OSError:
                came.append(-1)
        complete: np.ndarray = np.array(came) == sizes
        return complete

    def _handles(self, shards: list[int]) -> Iterable[int]:
        """An open file for each sample of a batch; -1 where there is none, which the careful way says again."""
        several = set(shards)
        if len(several) > OPEN_FILES:  # not all stay open
            return map(self._handle, shards)
        known = {shard: self._handle(shard) for shard in several}
        return [known[shard] for shard in shards]

    def _handle(self, shard: int) -> int:
        try:
            return self.fetcher.reader.descriptor(shard)
        except (OSError, DataError):
            return -1

    def _copy(self, values: np.ndarray, chosen: np.ndarray, at: np.ndarray, good: np.ndarray) -> None:
        """Copies the values of chosen members out of the buffer, and clears `good` of rows that have none."""
        count, nbytes = len(chosen), values[0].nbytes
        good &= chosen >= 0
        out = values.reshape(count, -1).view(np.uint8)
        starts = (at[np.arange(count), chosen] + 1) * BLOCK + NPY_HEAD
        first = int(starts[0])
        if good.all() and (starts == first).all():
            np.copyto(out, self._buffer[:count, first : first + nbytes])
        else:
            out[~good] = 0
            for row in np.flatnonzero(good).tolist():
                out[row] = self._buffer[row, starts[row] : starts[row] + nbytes]

    def _tell(
        self, layout: Layout, found: Found, columns: dict[str, list[Any]], good: np.ndarray, run: Run
    ) -> None:
        """Fills in what the item's texts tell, and clears `good` of rows whose texts must be read with care."""
        starts = (found.at + 1) * BLOCK
        begins, ends = starts.tolist(), (starts + found.sizes).tolist()
        members = dict(layout.texts)
        captions_only = self.item.labels is None and self.item.layout is None
        alone = members.get(caption_member(str(self.item.caption_source))) if captions_only else None
        for row in np.flatnonzero(good).tolist():
            view, begin, end = self._rows[row], begins[row], ends[row]
            try:
                if alone is not None:  # nearly always, and half the time
                    text = bytes(view[begin[alone] : end[alone]])
                    columns["caption"][row] = caption_in(text, str(self.item.caption_source))
                    continue
                texts = {name: bytes(view[begin[k] : end[k]]) for name, k in layout.texts}
                for name, value in self.item.told(texts, run.position + row, run.bucket).items():
                    columns[name][row] = value
            except DataError:
                good[row] = False  # said again, and written down, by the careful way

    def _learn(self, bucket: int, whole: np.ndarray, sizes: np.ndarray) -> Layout | None:
        for row in np.flatnonzero(whole)[:1]:
            data = bytes(self._rows[row][: sizes[row]])
            self._layouts[bucket] = layout_of(data, self.item, bucket)
        return self._layouts.get(bucket)


def _all_finite(latents: np.ndarray) -> bool:
    """Of floats or the bits of bfloat16: as integers they have the same order, and beyond infinity are only NaNs."""
    signed, infinity = _BITS[latents.dtype.name]
    beyond = latents.view(signed).max(initial=0) >= infinity  # of those above 0
    unsigned = signed.replace("int", "uint")
    return not beyond and bool(latents.view(unsigned).max(initial=0) < infinity + np.iinfo(signed).max + 1)


_KEPT = 4  # arrays
_ALONE = 2  # references to what only the list holds: the list's, and that of asking


class BatchMemory:
    """Arrays for the batches of one process, one after another."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array that nobody else has; its values mean nothing."""
        for number in range(len(self._kept)):
            known = self._kept[number].shape == shape and self._kept[number].dtype == dtype
            if known and sys.getrefcount(self._kept[number]) <= _ALONE:
                return self._kept[number]
        fresh = np.empty(shape, dtype=dtype)
        self._kept = [*self._kept[1 - _KEPT :], fresh]
        return fresh
