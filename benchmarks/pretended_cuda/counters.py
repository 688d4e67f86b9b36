"""Counts of operations on pretended CUDA tensors, and a roofline estimate of their time.

One call of an operator is a `Call`. Sums over calls are the deterministic measure: kernels, FLOPs, bytes, peak memory.
`Notes` records what makes the host or the device wait: copies and synchronisations, with the line that caused them.
"""

from __future__ import annotations

import gc
import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Operators that launch no kernel; reading a value is noted as a wait instead.
_VIEWS = {
    "view",
    "_unsafe_view",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "t",
    "detach",
    "alias",
    "as_strided",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "lift_fresh",
    "_reshape_alias",
    "unfold",
    "narrow",
    "diagonal",
    "set_",
    "is_same_size",
    "_local_scalar_dense",
    "resize_",
    "view_as_real",
    "movedim",
    "detach_",
    "requires_grad_",
    "_has_same_storage_numel",
    "is_pinned",
}
_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
NO_KERNEL = frozenset(_VIEWS | _ALLOCATIONS)
# Kernels per call of operators that launch more than one on CUDA: rounded from torch's sources and traces of cuDNN.
KERNELS = {
    "convolution_backward": 3,
    "native_group_norm": 2,
    "native_group_norm_backward": 3,
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_flash_attention_backward": 3,
    "embedding_dense_backward": 4,
    "_efficient_attention_backward": 2,
    "_scaled_dot_product_efficient_attention_backward": 2,
}
MATRIX_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"))
TENSORS_PER_FUSED_KERNEL = 120  # of _foreach and _fused operators

# The kinds of notes.
WAIT = "wait"  # the host waits for the device: .item(), .cpu(), nonzero, synchronize
BLOCKING = "blocking copy"  # host to device without non_blocking
PAGEABLE = "pageable copy"  # non_blocking, from memory that is not page-locked: staged by the host
PINNED = "pinned copy"  # non_blocking from page-locked memory: the only kind that overlaps
TO_HOST = "copy to host"  # non_blocking
MIXED = "mixed devices"  # an error on a GPU
CPU_INDEX = "index on the host"  # copied to the device on every call
FP32_PRODUCT = "fp32 matrix product"
KINDS = (WAIT, BLOCKING, PAGEABLE, PINNED, TO_HOST, MIXED, CPU_INDEX, FP32_PRODUCT)


@dataclass(frozen=True)
class Device:
    """Rates of the roofline: peak times the share that large kernels of each kind reach. Defaults are those of an H100 SXM."""

    half_flops: float = 989e12  # dense bf16, per second
    fp32_flops: float = 67e12
    tf32_flops: float = 494.5e12  # convolutions in fp32: cuDNN's default
    bytes_per_second: float = 3.35e12
    product_share: float = 0.60
    convolution_share: float = 0.45
    attention_share: float = 0.30
    fp32_share: float = 0.70
    memory_share: float = 0.80


@dataclass(frozen=True)
class Call:
    """One call of one operator."""

    operator: str
    kernels: int
    flops: int
    bytes: int
    dtype: torch.dtype | None

    def seconds(self, device: Device) -> tuple[float, float]:
        """Time of its arithmetic, and of its memory traffic."""
        convolution = "conv" in self.operator
        attention = "attention" in self.operator or "flash" in self.operator
        share = device.product_share
        if convolution or attention:
            share = device.convolution_share if convolution else device.attention_share
        if self.dtype in (torch.bfloat16, torch.float16):
            rate = device.half_flops * share
        elif convolution:
            rate = device.tf32_flops * device.convolution_share
        else:
            rate = device.fp32_flops * device.fp32_share
        return self.flops / rate, self.bytes / (device.bytes_per_second * device.memory_share)


@dataclass(frozen=True)
class Totals:
    """Sums over the calls since the last reset."""

    operators: int
    kernels: int
    teraflops: float
    gib_moved: float
    peak_gib: float
    roofline_ms: float
    memory_bound_ms: float  # part of roofline_ms in operators that wait for memory
    notes: dict[str, int]  # by kind; every kind is there
    kernels_of: dict[str, int] = field(default_factory=dict)  # by operator, most first
    convolution_inputs: dict[str, int] = field(default_factory=dict)  # "NCHW bfloat16" -> calls
    where: list[dict[str, Any]] = field(default_factory=list)  # {"kind", "what", "where", "times"}


class Counters:
    """What happened since the last `reset`. `mode.PretendedCuda` feeds it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.operators: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.notes: Counter[tuple[str, str, str]] = Counter()
        self.held_bytes = self.peak_bytes = 0  # of live storages on the device
        self._storages: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def reset(self) -> None:
        """Forgets all counts. Storages that are alive stay held, and are where the peak starts from."""
        gc.collect()
        self.calls.clear()
        for counter in (self.operators, self.layouts, self.notes):
            counter.clear()
        self.peak_bytes = self.held_bytes

    def note(self, kind: str, what: str) -> None:
        self.notes[kind, what, location()] += 1

    def count(
        self, operator: Any, arguments: Any, options: Any, inputs: Iterable[Tensor], result: Any
    ) -> None:
        """Counts one call whose inputs or outputs are on the device."""
        outputs = [x for x in _flat(result) if isinstance(x, Tensor)]
        tensors = list({id(x): x for x in [*inputs, *outputs] if x.device.type == "cuda"}.values())
        if not tensors:
            return
        for tensor in outputs:
            self._hold(tensor)
        name = operator_name(operator)
        self.operators[name] += 1
        if name in NO_KERNEL:
            return
        if name == "convolution":
            x = arguments[0]
            last = (
                x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
                if x.dim() == 4
                else False
            )
            self.layouts[f"{'channels-last' if last else 'NCHW'} {str(x.dtype).removeprefix('torch.')}"] += 1
        kernels = KERNELS.get(name, 1)
        if name.startswith(("_foreach", "_fused")):
            kernels = max(1, len(tensors) // TENSORS_PER_FUSED_KERNEL)
        formula = flop_registry.get(operator._overloadpacket)
        flops = 0 if formula is None else int(formula(*arguments, **options, out_val=result))
        moved = sum(x.numel() * x.element_size() for x in tensors)
        floating = [
            x.dtype for x in [*outputs, *tensors] if x.device.type == "cuda" and x.is_floating_point()
        ]
        dtype = floating[0] if floating else None
        self.calls.append(Call(name, kernels, flops, moved, dtype))
        if name in MATRIX_PRODUCTS and dtype == torch.float32 and flops:
            self.note(FP32_PRODUCT, name)

    def _hold(self, tensor: Tensor) -> None:
        """Counts the memory of a storage until it is freed."""
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            if self._storages.pop(key, None) is not None:
                self.held_bytes -= size

        self._storages[key] = size, weakref.ref(storage, freed)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def times(self, *kinds: str) -> int:
        """Number of notes of these kinds."""
        return sum(count for (kind, _, _), count in self.notes.items() if kind in kinds)

    def totals(self, device: Device | None = None) -> Totals:
        device = device or Device()
        roofline = memory_bound = 0.0
        kernels: Counter[str] = Counter()
        for call in self.calls:
            arithmetic, memory = call.seconds(device)
            roofline += max(arithmetic, memory)
            memory_bound += memory if memory > arithmetic else 0.0
            kernels[call.operator] += call.kernels
        return Totals(
            operators=sum(self.operators.values()),
            kernels=sum(kernels.values()),
            teraflops=sum(call.flops for call in self.calls) / 1e12,
            gib_moved=sum(call.bytes for call in self.calls) / 2**30,
            peak_gib=self.peak_bytes / 2**30,
            roofline_ms=1e3 * roofline,
            memory_bound_ms=1e3 * memory_bound,
            notes={kind: self.times(kind) for kind in KINDS},
            kernels_of=dict(kernels.most_common()),
            convolution_inputs=dict(sorted(self.layouts.items())),
            where=[
                {"kind": kind, "what": what, "where": where, "times": times}
                for (kind, what, where), times in sorted(self.notes.items())
            ],
        )


def operator_name(operator: Any) -> str:
    """aten.mm.default -> mm."""
    name: str = operator._schema.name
    return name.split("::")[-1]


def _flat(value: Any) -> list[Any]:
    leaves: Callable[[Any], list[Any]] = torch.utils._pytree.tree_leaves
    return leaves(value)


_OURS = str(Path(__file__).parent)


def location() -> str:
    """File, line and text of the innermost frame outside of torch and this package: of ldmscale or DeepSpeed if there is one."""
    frame: FrameType | None = sys._getframe(1)
    found: dict[str, str] = {}
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_OURS, "<")) and "/torch/" not in path:
            for package in ("ldmscale", "deepspeed"):
                if f"/{package}/" in path and package not in found:
                    text = linecache.getline(path, frame.f_lineno).strip()
                    found[package] = f"{package}/{path.rsplit(f'/{package}/', 1)[1]}:{frame.f_lineno} {text}"
            found.setdefault("other", f"{Path(path).name}:{frame.f_lineno}")
        frame = frame.f_back
    return found.get("ldmscale") or found.get("deepspeed") or found.get("other") or "autograd"
