"""How the samples of a latent shard are laid out, and which of a batch are laid out so: by every byte of their headers.

All samples of a writer have the same headers but for names, sizes and checksums. So one sample that the careful parser
(`tar`) has read gives the layout, and the headers of a whole batch are compared with it by few operations on arrays.
What does not match is not wrong: whoever asks reads it with care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldmscale.data.images.decode import LATENT, decode_array
from ldmscale.data.latents.format import FLIPPED, TEXT, read_text
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.shards.tar import BLOCK, TarFault, members, split_name
from ldmscale.errors import DataError

NPY_HEAD = 128  # bytes before the values of a .npy

# Where a ustar header says what differs between samples.
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 135), slice(148, 154)
_OCTAL = 8.0 ** np.arange(10, -1, -1)
_shared = np.full(BLOCK, 255, dtype=np.uint8)
_shared[_NAME] = 0
_shared[_SIZE] = _shared[_SUM] = ~7 & 255  # of octal digits the last three bits differ
_SHARED = _shared.view(np.uint64)  # bits that headers of one kind of member share
_SUM_BLANK = 8 * ord(" ")  # a header's checksum counts its own field as spaces
_LONGEST_NAME, _SLASH = 100, ord("/")
# Keys that need no care: printable, no dot, no absolute or Windows path. Others are read as they always were.
_PLAIN = [code for code in range(ord("!"), ord("~") + 1) if chr(code) not in ".\\:"]
_KINDS = np.full(256, 2, dtype=np.uint8)  # 0: nothing, 1: of a plain key, 2: other bytes
_KINDS[0], _KINDS[_PLAIN] = 0, 1
_INSIDE = np.tri(_LONGEST_NAME, k=-1, dtype=np.uint8)  # by the key's length: 1 inside of the key


@dataclass(frozen=True)
class Layout:
    """What all samples of a writer share.

    Attributes:
        at: blocks of their headers in the sample that gave the layout, int64 [members].
        headers: of each, uint64 [members, 64].
        first_names: the first member's name without the key, for keys of every length: uint8 [100, 100].
        other_names: how the members' names differ from that (exclusive or), likewise: uint8 [100, members, 100].
        sums: what the bytes of each header add up to beside the key and the size's digits, int64 [members].
        arrays: numbers of the members that hold arrays.
        texts: extensions and numbers of those that the item looks at.
        npy_head: the 128 bytes that each array begins with.
        array_bytes: of the values behind it.
        text: number of the member that holds the text encoding; None where the item reads none.
        text_head, text_bytes: of it, likewise.
    """

    at: np.ndarray
    headers: np.ndarray
    first_names: np.ndarray
    other_names: np.ndarray
    sums: np.ndarray
    arrays: dict[str, int]
    texts: tuple[tuple[str, int], ...]
    npy_head: np.ndarray
    array_bytes: int
    text: int | None
    text_head: np.ndarray
    text_bytes: int

    @property
    def arrays_first(self) -> bool:
        """Whether the arrays come before all texts: then they are at the same place of every sample."""
        return max(self.arrays.values()) < len(self.arrays)

    def values_at(self, members: np.ndarray) -> np.ndarray:
        """Where the values of some arrays begin in a sample, int64 [members]."""
        found: np.ndarray = (self.at[members] + 1) * BLOCK + NPY_HEAD
        return found


class Found(NamedTuple):
    """The samples of a batch. What is said of those that do not match means nothing."""

    at: np.ndarray  # block of each header, int64 [b, members]
    sizes: np.ndarray  # bytes of each member, int64 [b, members]
    names: np.ndarray  # of each first member, uint8 [b, 100]
    keys: np.ndarray  # bytes of each key, int64 [b]
    good: np.ndarray  # which match, bool [b]

    def key_texts(self) -> list[str]:
        """The keys of those that match; of others anything."""
        names = self.names.view("S100")[:, 0].tolist()
        return [
            name[:length].decode("ascii", "replace")
            for name, length in zip(names, self.keys.tolist(), strict=True)
        ]


def layout_of(data: bytes, item: LatentItem, bucket: int = 0) -> Layout | None:
    """The layout of the sample of a bucket whose bytes these are; None if its like must be read with care."""
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
    head = text_head = b""
    text_form = item.text
    stored, shape = item.format.stored_type, item.format.stored_shape_of(bucket)
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
            if array.shape != shape or array.dtype != stored:
                return None
            if member.size != NPY_HEAD + array.nbytes or (head and head != value[:NPY_HEAD]):
                return None
            arrays[extension], head = len(names), value[:NPY_HEAD]
        if extension == TEXT and text_form is not None:
            try:
                read_text({TEXT: value}, text_form)
            except DataError:
                return None
            if member.size != NPY_HEAD + text_form.stored_bytes:
                return None
            text_head = value[:NPY_HEAD]
        headers.append(np.frombuffer(data, np.uint8, BLOCK, member.start))
        names.append(extension)
    if not arrays or len(set(names)) < len(names) or (text_form is not None and TEXT not in names):
        return None
    extensions = [f".{name}".encode() for name in names]
    endings = np.zeros((_LONGEST_NAME, len(extensions), 2 * _LONGEST_NAME), dtype=np.uint8)
    for length in range(_LONGEST_NAME):
        for k, ending in enumerate(extensions):
            endings[length, k, length : length + len(ending)] = list(ending[:_LONGEST_NAME])
    # Of names too long for the key nothing matches: they have other headers.
    endings = endings[:, :, :_LONGEST_NAME]
    together = np.stack(headers)
    # What a header's bytes add up to beside the first member's name and the digits of the size.
    fixed = np.ones(BLOCK, dtype=bool)
    fixed[:100] = fixed[_SIZE] = fixed[148:156] = False
    sums = together[:, fixed].sum(axis=1, dtype=np.int64) + _SUM_BLANK + 11 * ord("0")
    sums += np.array([sum(extension) - sum(extensions[0]) for extension in extensions])
    return Layout(
        at=np.array([member.start // BLOCK for member in found]),
        headers=together.view(np.uint64),
        first_names=np.ascontiguousarray(endings[:, 0]),
        other_names=endings ^ endings[:, :1],
        sums=sums,
        arrays=arrays,
        texts=tuple((name, k) for k, name in enumerate(names) if name in item.told_members),
        npy_head=np.frombuffer(head, np.uint8),
        array_bytes=int(np.prod(shape)) * stored.itemsize,
        text=None if text_form is None else names.index(TEXT),
        text_head=np.frombuffer(text_head, np.uint8),
        text_bytes=0 if text_form is None else text_form.stored_bytes,
    )


def matching(layout: Layout, blocks: np.ndarray, spans: np.ndarray) -> Found:
    """Finds the members of the samples of a batch and compares all their headers with the layout.

    Args:
        blocks: uint8 [b, blocks, 512].
        spans: bytes of each sample, int64 [b].
    """
    # Texts are mostly shorter than a block, so samples mostly have their members where the layout's own has them.
    usual, lines = layout.at, np.arange(len(blocks))
    if usual[-1] >= blocks.shape[1]:
        return _checked(layout, blocks, lines, _chained(layout, blocks, lines), spans)
    found = _checked(layout, blocks, lines, usual + np.zeros((len(blocks), 1), dtype=np.int64), spans)
    rest = np.flatnonzero(~found.good)
    if len(rest):
        others = _checked(layout, blocks, rest, _chained(layout, blocks, rest), spans[rest])
        for mine, other in zip(found, others, strict=True):
            mine[rest] = other
    return found


def _chained(layout: Layout, blocks: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """The blocks of the headers of some samples, each where the member before it ends: int64 [lines, members]."""
    at = np.zeros((len(lines), len(layout.at)), dtype=np.int64)
    for member in range(1, len(layout.at)):
        before = at[:, member - 1]
        sizes = (blocks[lines, before, _SIZE] - ord("0")) @ _OCTAL
        at[:, member] = np.minimum(before + 1 + np.ceil(sizes / BLOCK), blocks.shape[1] - 1)
    return at


def _checked(
    layout: Layout, blocks: np.ndarray, lines: np.ndarray, at: np.ndarray, spans: np.ndarray
) -> Found:
    """Whether the samples `blocks[lines]` match, with their headers `at` [lines, members]."""
    headers = blocks[lines[:, None], at]  # [lines, members, 512], a copy
    digits, stated = headers[:, :, _SIZE] & 7, headers[:, :, _SUM] & 7  # that they are digits is seen below
    sizes = (digits @ _OCTAL).astype(np.int64)
    ends = at + 1 - (-sizes // BLOCK)
    good = (ends[:, :-1] == at[:, 1:]).all(axis=1)
    good &= ends[:, -1] * BLOCK == spans
    arrays = [(member, layout.npy_head, layout.array_bytes) for member in layout.arrays.values()]
    if layout.text is not None:
        arrays.append((layout.text, layout.text_head, layout.text_bytes))
    for member, head, nbytes in arrays:
        begin = np.minimum(at[:, member] + 1, blocks.shape[1] - 1)
        good &= (blocks[lines, begin, :NPY_HEAD] == head).all(axis=1)
        good &= sizes[:, member] == NPY_HEAD + nbytes
    differ = headers.view(np.uint64) ^ layout.headers
    differ &= _SHARED
    if differ.max():  # looks faster than any()
        good &= ~differ.any(axis=(1, 2))
    names = headers[:, :, _NAME]
    first = np.ascontiguousarray(names[:, 0])
    keys = (first == ord(".")).argmax(axis=1)
    good &= _named(layout, names, first, keys)
    # Names that are the key and an extension differ by the extensions' bytes alone.
    total = digits.sum(axis=2, dtype=np.int64) + layout.sums
    total += first.sum(axis=1, dtype=np.int64)[:, None]
    good &= (total == stated @ _OCTAL[-6:]).all(axis=1)
    return Found(at, sizes, first, keys, good)


def _named(layout: Layout, names: np.ndarray, first: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which samples' members [b, members, 100] are named by a plain key of `keys` bytes and the extensions: bool [b]."""
    # Of the first name the extension is taken away, and nothing but a plain key may be left.
    good: np.ndarray = (_KINDS[first ^ layout.first_names[keys]] == _INSIDE[keys]).all(axis=1)
    good &= ((names ^ first[:, None]) == layout.other_names[keys]).all(axis=(1, 2))
    slashes = (first[:, 0] == _SLASH) | (first[np.arange(len(keys)), keys - 1] == _SLASH)
    good &= ~slashes
    return good
