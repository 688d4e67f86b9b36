"""The context in which tensors on "cuda" are pretended, and every operator on them is counted.

    from benchmarks.pretended_cuda.device import pretend
    pretend()                                   # before torch
    from benchmarks.pretended_cuda.mode import PretendedCuda
    with PretendedCuda() as gpu:
        network = Network().to("cuda")          # no values, no memory
        gpu.counters.reset()
        network(x).sum().backward()
        print(gpu.counters.totals())

Tensors on the CPU are real. What reads a value from the device gets `scalar`, and is noted as a wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.pretended_cuda import counters as kinds
from benchmarks.pretended_cuda.counters import Counters, operator_name

CUDA = torch.device("cuda", 0)
# Operators whose output's size depends on values: the host waits for it.
_SIZED_BY_VALUES = frozenset(
    ("nonzero", "masked_select", "unique_dim", "_unique2", "repeat_interleave", "bincount", "equal")
)


def _never(*_: Any) -> Any:
    raise AssertionError("a kernel of pretended CUDA was called with values")


# Without a CUDA kernel these fall apart into several operators before anything can count them; on CUDA each is one kernel.
_whole = torch.library.Library("aten", "IMPL", "CUDA")
for _name in ("silu_backward", "mish_backward"):
    with suppress(RuntimeError):  # a build that has the kernel
        _whole.impl(_name, _never)


class _Fakes(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:
        """True whatever torch.cuda.is_available was made to answer."""
        return True


class PretendedCuda:
    """Counts what runs inside; see `Counters`.

    Args:
        scalar: what every number read from the device is.
        truth: what every boolean read from the device is.
    """

    def __init__(self, scalar: float = 1.0, truth: bool = False) -> None:
        self.scalar, self.truth = scalar, truth
        self.counters = Counters()
        self._pinned: dict[
            int, Tensor
        ] = {}  # by address of the storage; kept, so that no address is used again

    def pin(self, tensor: Tensor) -> Tensor:
        """Marks the memory of a CPU tensor as page-locked, as the loader of a GPU run makes it."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return False
        return tensor.untyped_storage().data_ptr() in self._pinned

    def copied_to_device(self, source: Tensor, non_blocking: bool) -> None:
        kind = kinds.BLOCKING
        if non_blocking:
            kind = kinds.PINNED if self.is_pinned(source) else kinds.PAGEABLE
        self.counters.note(kind, f"{source.numel() * source.element_size()} B")

    def __enter__(self) -> PretendedCuda:
        self._stack = ExitStack()
        torch._C._ensureCUDADeviceGuardSet()
        self._replace(torch.cuda, "_lazy_init", lambda: None)  # called by every move to a device
        self._replace(torch.cuda, "synchronize", lambda *_: self.counters.note(kinds.WAIT, "synchronize"))
        self._replace(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention))
        # FakeTensor has one of its own, which reads element by element.
        self._replace(FakeTensor, "tolist", lambda tensor: self._tolist(tensor))
        self._replace(Tensor, "numpy", self._numpy(Tensor.numpy))
        self._replace(Tensor, "pin_memory", lambda tensor, *_: self.pin(tensor))
        self._replace(Tensor, "is_pinned", lambda tensor, *_: self.is_pinned(tensor))
        # Autograd would look for the threads of a device that is not there.
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._stack.enter_context(_Fakes(allow_non_fake_inputs=True))
        self._stack.enter_context(_Watch(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _replace(self, owner: Any, name: str, by: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, by)

    def _tolist(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self.counters.note(kinds.WAIT, "tolist")
        return np.full(tuple(tensor.shape), self.scalar).tolist()

    def _numpy(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def numpy(tensor: Tensor, **options: Any) -> Any:
            if not isinstance(tensor, FakeTensor):
                return real(tensor, **options)
            kind = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
            return np.zeros(tuple(tensor.shape), dtype=str(kind).removeprefix("torch."))

        return numpy


def _attention(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel that CUDA's dispatcher takes: flash for half types up to head size 256 in eights, else memory-efficient."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Tensor:
        if q.device.type != "cuda":
            return real(q, k, v, *others, **options)
        size, half = q.shape[-1], q.dtype in (torch.bfloat16, torch.float16)
        out: Tensor
        if half and size <= 256 and size % 8 == 0:
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[0]
            return out
        if size % (8 if half else 4):
            raise ValueError(f"CUDA has no fused attention for head size {size} in {q.dtype}")
        trained = torch.is_grad_enabled() and q.requires_grad
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, trained)[0]
        return out

    return attention


class _Watch(TorchDispatchMode):
    """Counts every operator on the device, and passes it on."""

    def __init__(self, gpu: PretendedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        options = kwargs or {}
        tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        target = options.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not to_device and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():  # the host's own work, with values
                return func(*args, **options)
        name = operator_name(func)
        if name == "_local_scalar_dense":
            return self._scalar(args[0])
        out = self._note(name, args, options, tensors, to_device)
        if out is None:
            out = func(*args, **options)
        self.gpu.counters.count(func, args, options, tensors, out)
        return out

    def _scalar(self, tensor: Tensor) -> bool | int | float:
        if tensor.device.type == "cuda":
            self.gpu.counters.note(kinds.WAIT, "item")
        if tensor.dtype == torch.bool:
            return self.gpu.truth
        return self.gpu.scalar if tensor.dtype.is_floating_point else int(self.gpu.scalar)

    def _note(
        self, name: str, args: Any, options: Any, tensors: list[Tensor], to_device: bool
    ) -> Tensor | None:
        """Notes copies and waits. Returns the result where torch's own pretended one would not do."""
        notes = self.gpu.counters
        on_device = [x for x in tensors if x.device.type == "cuda"]
        on_host = [x for x in tensors if x.device.type == "cpu" and x.dim() > 0]
        if name in _SIZED_BY_VALUES and on_device:
            if not (name == "repeat_interleave" and len(tensors) > 1):
                notes.note(kinds.WAIT, name)
            least = options.get("minlength", args[2] if len(args) > 2 else 0)
            if name == "bincount" and least:
                return torch.zeros(least, dtype=torch.int64, device=args[0].device)
        if name == "_to_copy" and options.get("device") is not None:
            source: Tensor = args[0]
            non_blocking = bool(options.get("non_blocking", False))
            if to_device and source.device.type == "cpu":
                self.gpu.copied_to_device(source, non_blocking)
                if not isinstance(source, FakeTensor):
                    # torch would keep the values of a small tensor, and later compute with them on a real device.
                    dtype = options.get("dtype") or source.dtype
                    return torch.empty_strided(source.size(), source.stride(), dtype=dtype, device=CUDA)
            elif not to_device and source.device.type == "cuda":
                notes.note(kinds.TO_HOST if non_blocking else kinds.WAIT, "to the host")
        elif name == "copy_" and args[0].device != args[1].device:
            non_blocking = bool(args[2] if len(args) > 2 else options.get("non_blocking", False))
            if args[0].device.type == "cuda":
                self.gpu.copied_to_device(args[1], non_blocking)
            else:
                notes.note(kinds.TO_HOST if non_blocking else kinds.WAIT, "copy_ to the host")
        elif on_device and on_host:
            kind = kinds.CPU_INDEX if name in ("index", "index_put_", "index_put") else kinds.MIXED
            notes.note(kind, name)
        return None
