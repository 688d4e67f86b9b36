"""Micro-batches of latents, read and verified by the batch.

A sample of latents is a few small members, one of them an array of fixed size; parsing its headers one by one in Python
takes ten times as long as reading it. All samples of a writer have the same headers but for names, sizes and checksums,
so one sample that the careful parser (`tar`) has read gives the layout, and the headers of a whole batch are compared
with it at once: every byte of them, checksums included. Whatever does not match, or is not finite, or cannot be read, is
left to the careful way, `Fetcher.fetch`, which reads it after all or says why not. So values, order, stand-ins and
ledger are the same either way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldmscale.data.decode import LATENT, decode_array
from ldmscale.data.fetch import Fetched, Fetcher, Ticket
from ldmscale.data.items import LatentItem
from ldmscale.data.latents import FLIPPED
from ldmscale.data.tar import BLOCK, TarFault, members, split_name
from ldmscale.errors import DataError

SKIPPED = "skipped"
"""In a batch: how many samples were passed over for each of its own."""

# Where a ustar header says what differs between samples.
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 135), slice(148, 154)
_OCTAL = 8.0 ** np.arange(10, -1, -1)
_NAMES = np.dtype({"names": ["name"], "formats": ["S100"], "offsets": [0], "itemsize": BLOCK})
_shared = np.full(BLOCK, 255, dtype=np.uint8)
_shared[_NAME] = _shared[_SIZE] = _shared[_SUM] = 0
_SHARED = _shared.view(np.uint64)  # bits that headers of one kind of member share
_SUM_BLANK = 8 * ord(" ")  # a header's checksum counts its own field as spaces
_NPY_HEAD = 128  # bytes before the values of a .npy
# Keys that need no care: printable, no dot, no absolute or Windows path. Others are read as they always were.
_KEY = re.compile(rb"[!-~]+")
_CAREFUL = re.compile(rb"^/|/$|[.\\:]")
_LONGEST_SPAN = 1 << 24  # bytes of a sample


@dataclass(frozen=True)
class Layout:
    """What all samples of a writer share.

    Attributes:
        extensions: of the members, in order, as they stand behind the key: b".json".
        at: blocks of their headers in the sample that gave the layout, int64 [members].
        headers: of each, uint64 [members, 64].
        sums: what the bytes of each header add up to beside the key and the size's digits, int64 [members].
        arrays: numbers of the members that hold arrays.
        texts: numbers and extensions of those that the item looks at.
        npy_head: the 128 bytes that each array begins with.
        array_bytes: of the values behind it.
    """

    extensions: tuple[bytes, ...]
    at: np.ndarray
    headers: np.ndarray
    sums: np.ndarray
    arrays: dict[str, int]
    texts: tuple[tuple[int, str], ...]
    npy_head: np.ndarray
    array_bytes: int


class LatentReader:
    """Reads the latents of tickets as one batch. For local shards.

    Args:
        fetcher: reads what must be read with care; its item is a `LatentItem`.
        item: the same.
    """

    def __init__(self, fetcher: Fetcher[Any], item: LatentItem) -> None:
        self.fetcher, self.item = fetcher, item
        self.careful = 0  # samples that did not go by the batch
        self._dtype, self._shape = np.dtype(item.format.dtype), item.format.stored_shape
        self._layout: Layout | None = None
        self._buffer = np.empty((0, 0), dtype=np.uint8)
        self._rows: list[memoryview] = []

    def read(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Reads a micro-batch of consecutive tickets of one bucket.

        Returns:
            "latent" [b, *stored_shape] in the stored dtype, "key", "position" int64 [b], SKIPPED int64 [b], and what the
            item adds: "caption", "tokens" int64 [b, max_tokens], "label" int64 [b].

        Raises:
            DataError: as `Fetcher.fetch`.
        """
        latents, told = self._by_batch(tickets)
        skipped = [0] * len(tickets)
        upcast: list[tuple[int, np.ndarray]] = []
        for row, ticket in enumerate(tickets):
            if told[row] is None:
                self.careful += 1
                fetched: Fetched[Any] = self.fetcher.fetch(ticket)
                own = dict(fetched.item)
                latent = own.pop("latent")
                if latent.dtype == latents.dtype:
                    latents[row] = latent
                else:
                    upcast.append((row, latent))
                skipped[row] = fetched.skipped
                told[row] = {**own, "key": fetched.key}
        if upcast:  # arrays of another dtype than the set's; float32 holds both
            latents = latents.astype(np.float32)
            for row, latent in upcast:
                latents[row] = latent
        rows: list[dict[str, Any]] = [row for row in told if row is not None]
        batch: dict[str, Any] = {
            "latent": torch.from_numpy(latents),
            "key": [row["key"] for row in rows],
            "position": torch.tensor([ticket.position for ticket in tickets], dtype=torch.int64),
            SKIPPED: torch.tensor(skipped, dtype=torch.int64),
        }
        if self.item.caption_source is not None:
            captions = batch["caption"] = [row["caption"] for row in rows]
            if self.item.tokenizer is not None:
                batch["tokens"] = torch.from_numpy(self.item.tokenizer.encode(captions))
        if self.item.labels is not None:
            batch["label"] = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        return batch

    def _by_batch(self, tickets: Sequence[Ticket]) -> tuple[np.ndarray, list[dict[str, Any] | None]]:
        """Latents [b, *stored_shape] and what else each sample tells; None where it must be read with care."""
        count = len(tickets)
        latents = np.empty((count, *self._shape), dtype=self._dtype)
        told: list[dict[str, Any] | None] = [None] * count
        shards, indices = self.fetcher.sequence.places(tickets[0].bucket, tickets[0].number, count)
        offsets, sizes = self.fetcher.reader.index.spans(shards, indices)
        whole = self._fill(shards.tolist(), offsets.tolist(), sizes.tolist())
        if not whole.any():
            return latents, told
        if self._layout is None:
            self._learn(whole, sizes)
        if self._layout is None:
            return latents, told
        layout, blocks = self._layout, self._buffer[:count].reshape(count, -1, BLOCK)
        at, ends, names, good = _matching(layout, blocks, sizes)
        good &= whole
        lines = np.arange(count)
        for member in layout.arrays.values():
            heads = blocks[lines, np.minimum(at[:, member] + 1, blocks.shape[1] - 1), :_NPY_HEAD]
            good &= (heads == layout.npy_head).all(axis=1)
        if not good.any():
            self._learn(whole, sizes)
            return latents, told
        chosen = [layout.arrays.get(self.item.member(ticket.position), -1) for ticket in tickets]
        self._copy(latents, np.array(chosen), at, good)
        starts, lengths, wanted = ((at + 1) * BLOCK).tolist(), ends.tolist(), good.tolist()
        first = layout.extensions[0]
        for row in range(count):
            if not wanted[row]:
                continue
            key = names[row][0][: -len(first)]
            if names[row] != [key + extension for extension in layout.extensions]:
                continue
            if _KEY.fullmatch(key) is None or _CAREFUL.search(key) is not None:
                continue
            view, begin, length = self._rows[row], starts[row], lengths[row]
            try:
                own = self.item.told(
                    {name: bytes(view[begin[k] : begin[k] + length[k]]) for k, name in layout.texts}
                )
            except DataError:
                continue  # said again, and written down, by the careful way
            own["key"] = key.decode("ascii")
            told[row] = own
        return latents, told

    def _fill(self, shards: list[int], offsets: list[int], sizes: list[int]) -> np.ndarray:
        """Reads each sample's span into a row of the buffer. Returns which came whole, bool [b]."""
        longest = -(-max(sizes) // BLOCK) * BLOCK
        if longest > _LONGEST_SPAN:
            return np.zeros(len(shards), dtype=bool)
        if self._buffer.shape[0] < len(shards) or self._buffer.shape[1] < longest:
            self._buffer = np.zeros((len(shards), longest), dtype=np.uint8)
            self._rows = [row.data for row in self._buffer]
        whole = []
        for row, shard, offset, size in zip(self._rows, shards, offsets, sizes):  # noqa: B905  the buffer may be longer
            try:
                handle = self.fetcher.reader.descriptor(shard)
                whole.append(os.preadv(handle, [row[:size]], offset) == size)
            except (OSError, DataError):
                whole.append(False)
        return np.array(whole)

    def _copy(self, latents: np.ndarray, chosen: np.ndarray, at: np.ndarray, good: np.ndarray) -> None:
        """Copies the values out of the buffer, and clears `good` of rows without, or with some that are not finite."""
        assert self._layout is not None
        count, nbytes = len(chosen), self._layout.array_bytes
        good &= chosen >= 0
        out = latents.reshape(count, -1).view(np.uint8)
        starts = (at[np.arange(count), chosen] + 1) * BLOCK + _NPY_HEAD
        first = int(starts[0])
        if good.all() and (starts == first).all():
            np.copyto(out, self._buffer[:count, first : first + nbytes])
        else:
            out[~good] = 0
            for row in np.flatnonzero(good):
                out[row] = self._buffer[row, starts[row] : starts[row] + nbytes]
        if not _all_finite(latents):
            good &= np.isfinite(latents.reshape(count, -1)).all(axis=1)

    def _learn(self, whole: np.ndarray, sizes: np.ndarray) -> None:
        for row in np.flatnonzero(whole)[:1]:
            self._layout = layout_of(bytes(self._rows[row][: sizes[row]]), self.item)


def layout_of(data: bytes, item: LatentItem) -> Layout | None:
    """The layout of the sample whose bytes these are; None if its like must be read with care."""
    found = []
    try:
        for member in members(lambda offset, count: data[offset : offset + count], len(data)):
            found.append(member)
    except TarFault as fault:
        if fault.kind != "no_end_mark":
            return None
    names: list[str] = []
    headers: list[np.ndarray] = []
    arrays: dict[str, int] = {}
    head = b""
    for member in found:
        named = split_name(member.name)
        if named is None or member.refused or member.data != member.start + BLOCK:
            return None
        extension, value = named[1], data[member.data : member.data + member.size]
        if extension in (LATENT, FLIPPED):
            try:
                array = decode_array(value)
            except DataError:
                return None
            if array.shape != item.format.stored_shape or array.dtype != np.dtype(item.format.dtype):
                return None
            if member.size != _NPY_HEAD + array.nbytes or (head and head != value[:_NPY_HEAD]):
                return None
            arrays[extension], head = len(names), value[:_NPY_HEAD]
        headers.append(np.frombuffer(data, np.uint8, BLOCK, member.start))
        names.append(extension)
    if not arrays or len(set(names)) < len(names):
        return None
    extensions = [f".{name}".encode() for name in names]
    together = np.stack(headers)
    nbytes = int(np.prod(item.format.stored_shape)) * np.dtype(item.format.dtype).itemsize
    # What a header's bytes add up to beside the first member's name and the digits of the size.
    fixed = np.ones(BLOCK, dtype=bool)
    fixed[:100] = fixed[_SIZE] = fixed[148:156] = False
    sums = together[:, fixed].sum(axis=1, dtype=np.int64) + _SUM_BLANK + 11 * ord("0")
    sums += np.array([sum(extension) - sum(extensions[0]) for extension in extensions])
    return Layout(
        extensions=tuple(extensions),
        at=np.array([member.start // BLOCK for member in found]),
        headers=together.view(np.uint64),
        sums=sums,
        arrays=arrays,
        texts=tuple((k, name) for k, name in enumerate(names) if name in item.told_members),
        npy_head=np.frombuffer(head, np.uint8),
        array_bytes=nbytes,
    )


def _matching(
    layout: Layout, blocks: np.ndarray, spans: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[list[bytes]], np.ndarray]:
    """Finds the members of the samples of a batch and compares all their headers with the layout.

    Args:
        blocks: uint8 [b, blocks, 512].
        spans: bytes of each sample [b].

    Returns:
        The block of each header [b, members], the bytes of each member [b, members], their names, and which samples
        match [b].
    """
    # Texts are mostly shorter than a block, so samples mostly have their members where the layout's own has them.
    usual = layout.at
    if usual[-1] < blocks.shape[1]:
        headers = blocks[:, usual]  # [b, members, 512], a copy
        found = _checked(layout, headers, np.broadcast_to(usual, headers.shape[:2]), spans)
        if found[-1].all():
            return found
    count, wide = blocks.shape[0], blocks.shape[1]
    lines = np.arange(count)
    at = np.zeros((count, len(usual)), dtype=np.int64)
    for member in range(1, len(usual)):
        before = np.minimum(at[:, member - 1], wide - 1)
        size = (blocks[lines, before, _SIZE] - ord("0")) @ _OCTAL
        at[:, member] = before + 1 + np.ceil(size / BLOCK)
    at = np.minimum(at, wide - 1)
    return _checked(layout, blocks[lines[:, None], at], at, spans)


def _checked(
    layout: Layout, headers: np.ndarray, at: np.ndarray, spans: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[list[bytes]], np.ndarray]:
    digits, stated = headers[:, :, _SIZE] - ord("0"), headers[:, :, _SUM] - ord("0")
    sizes = (digits @ _OCTAL).astype(np.int64)
    ends = at + 1 + (sizes + (BLOCK - 1)) // BLOCK
    good = (ends[:, :-1] == at[:, 1:]).all(axis=1) & (ends[:, -1] * BLOCK == spans)
    # Where the names are the key and an extension (the caller looks) they differ by the extensions' bytes alone.
    keys = headers[:, 0, _NAME].sum(axis=1, dtype=np.int64)[:, None]
    good &= (keys + digits.sum(axis=2, dtype=np.int64) + layout.sums == stated @ _OCTAL[-6:]).all(axis=1)
    good &= (digits.max(axis=(1, 2)) < 8) & (stated.max(axis=(1, 2)) < 8)
    for member in layout.arrays.values():
        good &= sizes[:, member] == _NPY_HEAD + layout.array_bytes
    differ = (headers.view(np.uint64) ^ layout.headers) & _SHARED
    if differ.any():
        good &= ~differ.any(axis=(1, 2))
    return at, sizes, headers.view(_NAMES)["name"][:, :, 0].tolist(), good


def _all_finite(latents: np.ndarray) -> bool:
    if latents.dtype == np.float16:
        # Slow in numpy, but integers of the same bits have the same order: beyond infinity are only NaNs.
        bits = np.ascontiguousarray(latents)
        return bool(
            bits.view(np.int16).max(initial=0) < 0x7C00 and bits.view(np.uint16).max(initial=0) < 0xFC00
        )
    return bool(np.isfinite(latents).all())
