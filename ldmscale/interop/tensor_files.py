"""Files of tensors, and results that appear whole or not at all.

Tensors are mapped from the disk, not read: a conversion of a model of any size holds one copy of the tensors that
change their layout, and pages of the rest.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldmscale.errors import DataError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped. Raises DataError where it is none, or is cut off."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no whole safetensors file ({error}): get it again") from error


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


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
    save_file(dense, str(path), dict(metadata or {"format": "pt"}))


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
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises DataError where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): get it again") from error
