"""Limits on what a foreign file may expand to, checked before anything is copied, printed or walked.

A pickle and a YAML file can name one object many times. Ten lists of ten references each, nested nine deep, are some
hundred bytes in a file and 10^9 values for whoever copies them. Every object is weighed once, by its identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmscale.errors import DataError

MOST_VALUES = 1_000_000  # a checkpoint with the state of its optimizer has some 10,000
DEEPEST = 64
_CHARACTERS = 100  # of a text that count as one value
# Tied weights and averaged copies share memory; a tensor that is named again and again is an expansion.
_MOST_COPIES = 4
_SMALL_BYTES = 1 << 26

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def check_values(value: Any, where: str) -> None:
    """Raises DataError where `value` stands for too many values, is nested too deep, or holds itself."""
    _Scale(where).weigh(value, 0)


class _Scale:
    def __init__(self, where: str) -> None:
        self.where = where
        self.known: dict[int, int | None] = {}  # by identity; None: not weighed to its end
        self.kept: list[Any] = []  # so that no identity is given twice

    def weigh(self, value: Any, depth: int) -> int:
        """How many values it stands for."""
        if isinstance(value, (str, bytes, bytearray)):
            return 1 + len(value) // _CHARACTERS
        if isinstance(value, int):
            return 1 + value.bit_length() // (8 * _CHARACTERS)
        inner = _inside(value)
        if inner is None:
            return 1
        if id(value) in self.known:
            weight = self.known[id(value)]
            if weight is None:
                raise DataError(f"{self.where} has a value that holds itself: only plain values can be read")
            return weight
        if depth > DEEPEST:
            raise DataError(f"{self.where} is nested more than {DEEPEST} deep: only plain values can be read")
        self.known[id(value)] = None
        self.kept.append(value)
        total = 1
        for each in inner:
            total += self.weigh(each, depth + 1)
            if total > MOST_VALUES:
                raise DataError(
                    f"{self.where} expands to more than {MOST_VALUES:,} values: no model needs so many; remove what is not "
                    "its state_dict where the file comes from"
                )
        self.known[id(value)] = total
        return total


def _inside(value: Any) -> Iterable[Any] | None:
    """What a value holds; None of one that holds nothing."""
    if isinstance(value, Mapping):
        return (each for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    # A stand-in for a class that is not imported, see `pickles.plain`: nodes of OmegaConf also hold their parents.
    arguments, state = getattr(value, "arguments", None), getattr(value, "state", None)
    if isinstance(state, dict) and (
        held := next((key for key in ("_content", "_val") if key in state), None)
    ):
        return (state[held],)
    if isinstance(arguments, tuple) and not isinstance(value, (type, Tensor)):
        return (*arguments, state)
    return None


def tensor_fault(name: str, tensor: Tensor) -> str | None:
    """Why a tensor cannot be kept bit for bit; None where it can."""
    kind = type(tensor)
    if kind not in (Tensor, torch.nn.Parameter):
        return f"{name} is a {kind.__name__}, expected a plain tensor"
    if tensor.is_meta:
        return f"{name} has no values: it is a meta tensor"
    if tensor.layout != torch.strided:
        return f"{name} is {str(tensor.layout).removeprefix('torch.')}, expected a dense tensor"
    if tensor.is_quantized or tensor.dtype not in DTYPES:
        return f"{name} has the dtype {str(tensor.dtype).removeprefix('torch.')}, which cannot be kept"
    if tensor.is_neg() or tensor.is_conj():
        return f"{name} is a lazy view of other values, expected a plain tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{name} {list(tensor.shape)} has more elements than the file has for it"
    return None


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises DataError, with all faults, for tensors that cannot be kept bit for bit or that outgrow their file."""
    faults = [fault for name, tensor in tensors.items() if (fault := tensor_fault(name, tensor))]
    if not faults:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > _MOST_COPIES * path.stat().st_size + _SMALL_BYTES:
            faults = [f"its tensors take {size:,} bytes, and the file has {path.stat().st_size:,}"]
    if faults:
        raise DataError([f"{path}: {fault}: save plain tensors where it comes from" for fault in faults])


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of floating-point tensors with NaN or infinite elements. Reads them."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not _finite(tensor)
    ]


def _finite(tensor: Tensor) -> bool:
    flat = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no comparisons
    low, high = torch.aminmax(flat)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def tensors_in(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a value that `check_values` has passed, by their paths."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif (inner := _inside(value)) is not None:
        items = enumerate(inner)
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, each in items:
        found |= tensors_in(each, f"{name}/{key}" if name else str(key))
    return found
