"""Tensors in safetensors files: written, hashed and flushed in one pass; read by ranges, without a memory map.

A map would count every page that is read as memory of the process; here a range goes from the file into the
tensor that wants it. Any other safetensors reader reads the same files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, Field
from torch import Tensor

from ldmscale.errors import CheckpointError
from ldmscale.storage.digest import FileRecord
from ldmscale.storage.plain_values import Count, checked, parsed_object

_BLOCK_BYTES = 1 << 24
_LONGEST_HEADER = 1 << 30
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write contiguous 1-D tensors of host memory to a new file that is on the disk when this returns.

    Raises TypeError for a dtype that the format does not have, and OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Wide elements first: every tensor then begins at a multiple of its element's size, which readers rely on.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for key, tensor in ordered:
        if tensor.dtype not in _CODES:
            raise TypeError(f"{key} has the dtype {tensor.dtype}, which safetensors files do not have")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state = xxhash.xxh3_128()
    size = 0
    with open(path, "wb") as file:
        blocks = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(t) for _, t in ordered)]
        for block in blocks:
            for start in range(0, len(block), _BLOCK_BYTES):
                part = block[start : start + _BLOCK_BYTES]
                file.write(part)
                state.update(part)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, size, state.hexdigest())


class _Described(BaseModel):
    """A tensor in a header."""

    dtype: Literal[tuple(_DTYPES)]  # type: ignore[valid-type]
    shape: Annotated[list[Count], Field(max_length=64)]
    data_offsets: tuple[Count, Count]


class TensorFile:
    """One safetensors file, open for reading ranges of its flattened tensors.

    Raises CheckpointError if its header is torn.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None  # first: `__del__` looks at it, also where the header is torn
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length < min(size, _LONGEST_HEADER):
                    raise ValueError(f"found a header of {length} bytes in a file of {size}")
                self._header = parsed_object(file.read(length))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no whole safetensors file ({error}): take an older checkpoint"
            ) from error
        self._begin, self._size = 8 + length, size

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Copy elements [start, start + out.numel()) of the flattened tensor `key` into the 1-D tensor `out`,
        whatever its dtype and device.
        """
        if not out.numel():
            return
        dtype, first = self._place(key, start, out.numel())
        at = first + start * dtype.itemsize
        if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
            self._read_bytes(at, _bytes(out))
            return
        count = _BLOCK_BYTES // dtype.itemsize
        box = torch.empty(min(count, out.numel()), dtype=dtype)
        for low in range(0, out.numel(), count):
            part = out[low : low + count]
            self._read_bytes(at + low * dtype.itemsize, _bytes(box[: part.numel()]))
            part.copy_(box[: part.numel()])

    def _place(self, key: str, start: int, count: int) -> tuple[torch.dtype, int]:
        """Dtype and first byte of a tensor of which elements [start, start + count) are there.

        Raises CheckpointError, also where the header says what the file cannot hold.
        """
        if key not in self._header:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        try:
            entry = checked(_Described, self._header[key])
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} is damaged ({key}: {error}): take an older checkpoint"
            ) from error
        dtype, numel = _DTYPES[entry.dtype], math.prod(entry.shape)
        if start < 0 or start + count > numel:
            raise CheckpointError(f"{self.path} has fewer elements of {key} than are asked for")
        begin, end = entry.data_offsets
        if end - begin != numel * dtype.itemsize or self._begin + end > self._size:
            raise CheckpointError(
                f"{self.path} is damaged ({key} of {numel} elements lies in bytes {begin} to {end}): take an older checkpoint"
            )
        return dtype, self._begin + begin

    def _read_bytes(self, at: int, into: memoryview) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        done = 0
        while done < len(into):
            got = os.preadv(self._descriptor, [into[done : done + _BLOCK_BYTES]], at + done)
            if got == 0:
                raise CheckpointError(f"{self.path} ends too early")
            done += got

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the host."""
    return tensor.detach().view(torch.uint8).numpy().data
