"""Tensors of other formats: the files that hold them, and the tensors of ours that each of them corresponds to.

All forms of a `Slot` rearrange elements and compute nothing, so a conversion there and back is exact in every dtype.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldmscale.errors import CheckpointError, DataError
from ldmscale.storage.given_files import refuse_lfs_pointer

Form = Literal["same", "conv1", "conv2", "qkv"]


@dataclass(frozen=True)
class Slot:
    """A tensor called `foreign` there, which is `ours` here.

    Forms: "same"; "conv1" and "conv2", a linear layer that is a 1x1 convolution there (one or two more axes);
    "qkv", the three projections of an attention in one convolution, ordered by head, then q, k, v.
    """

    foreign: str
    ours: tuple[str, ...]
    form: Form = "same"
    heads: int = 1

    def foreign_shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        shape = tuple(shapes[self.ours[0]])
        if self.form == "qkv":
            return (3 * shape[0], *shape[1:], *((1,) if len(shape) == 2 else ()))
        return shape + (1,) * {"same": 0, "conv1": 1, "conv2": 2}[self.form]

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        if self.form == "same":
            return {self.ours[0]: tensor}
        if self.form != "qkv":
            return {self.ours[0]: tensor.flatten(1)}
        parts = tensor.reshape(self.heads, 3, -1, *tensor.shape[1:2])  # [H, 3, C/H(, C)]
        return {name: parts[:, i].flatten(0, 1) for i, name in enumerate(self.ours)}

    def to_foreign(self, weights: Mapping[str, Tensor]) -> Tensor:
        tensors = [weights[name] for name in self.ours]
        if self.form == "same":
            return tensors[0]
        if self.form != "qkv":
            return tensors[0].reshape(self.foreign_shape({self.ours[0]: tensors[0].shape}))
        by_head = [t.reshape(self.heads, -1, *t.shape[1:]) for t in tensors]  # each [H, C/H(, C)]
        joined = torch.stack(by_head, dim=1).flatten(0, 2)  # [3C(, C)]
        return joined[..., None] if joined.dim() == 2 else joined


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def faults_of(
    slots: Iterable[Slot],
    shapes: Mapping[str, Sequence[int]],
    found: Mapping[str, Tensor],
    prefix: str = "",
) -> list[str]:
    """Each slot that is missing in `found` (under `prefix`), or has another shape there."""
    faults = []
    for slot in slots:
        name = prefix + slot.foreign
        expected = slot.foreign_shape(shapes)
        if name not in found:
            faults.append(f"{name} is missing, expected {list(expected)}")
        elif not found[name].is_floating_point():
            dtype = str(found[name].dtype).removeprefix("torch.")
            faults.append(f"{name} has the dtype {dtype}, expected floating point")
        elif tuple(found[name].shape) != expected:
            faults.append(f"{name} has the shape {list(found[name].shape)}, expected {list(expected)}")
    return faults


def taken(slots: Iterable[Slot], found: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Our tensors out of theirs."""
    weights: dict[str, Tensor] = {}
    for slot in slots:
        weights |= slot.to_ours(found[prefix + slot.foreign])
    return weights


def given(slots: Iterable[Slot], weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Their tensors out of ours."""
    return {prefix + slot.foreign: slot.to_foreign(weights) for slot in slots}


_LONGEST_HEADER = 1 << 25  # a header of 1,000 tensors has 120 kB
_LONGEST_JSON = 1 << 26


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped. Raises DataError where it is none, or is cut off."""
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if _LONGEST_HEADER < length < path.stat().st_size:
            raise DataError(
                f"{path} claims a header of {length:,} bytes, more than the {_LONGEST_HEADER:,} that are read: it is no "
                "model's; get it again"
            )
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no whole safetensors file ({error}): get it again") from error


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file; tensors that share memory are written each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        dense[name] = tensor
    try:
        save_file(dense, str(path), dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}): free room there and run the command again"
        ) from error


def own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own: torch.save writes whole storages, and a mapped file is one."""
    tensor = tensor.detach().contiguous()
    if tensor.numel() == 0:
        return tensor.clone()
    size = tensor.numel() * tensor.element_size()
    buffer = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    buffer._kept = tensor  # type: ignore[attr-defined]  # the memory lives as long as the view
    return torch.frombuffer(buffer, dtype=tensor.dtype).reshape(tensor.shape)


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, ensure_ascii=False)
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 has no form for
        content = json.dumps(values, indent=2).encode("utf-8")
    path.write_bytes(content + b"\n")


def read_json(path: Path) -> Any:
    """Raises DataError where it is no JSON."""
    refuse_lfs_pointer(path)
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"it has more than {_LONGEST_JSON:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): get it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Raises DataError where it is no JSON object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(
            f"{path} holds a {type(values).__name__}, expected an object with settings: get it again"
        )
    return values
