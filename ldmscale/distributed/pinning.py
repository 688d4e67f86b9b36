"""Page-locked host memory, from which copies to and from a GPU do not block; pageable memory where there is none to lock.

A container's limit on locked memory, or a host that is nearly full, refuses it in the middle of a run. Copies are then
slower, and right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_TRIED_BYTES = 64 << 20  # what a loader of batches needs at the least
_reported: set[str] = set()


def host_memory(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Uninitialised host memory, page-locked if `pinned` and possible."""
    if pinned:
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            _report(error)
    return torch.empty(tuple(shape), dtype=dtype)


def pinned(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory; the tensor itself where that is not possible."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        _report(error)
        return tensor


def can_pin(size: int = _TRIED_BYTES) -> bool:
    """Whether `size` bytes can be page-locked now."""
    return host_memory((size,), torch.uint8, pinned=True).is_pinned()


def _report(error: RuntimeError) -> None:
    reason = next(iter(str(error).splitlines()), "")
    if reason not in _reported:
        _reported.add(reason)
        log.warning(
            "no page-locked memory (%s): copies between host and GPU go by pageable memory, which is slower; raise the limit "
            "on locked memory (ulimit -l) or the container's memory",
            reason,
        )
