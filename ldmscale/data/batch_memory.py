"""Memory of batches, used again when nobody holds it any more.

Fresh memory costs more than what is copied into it: its pages are faulted in one by one. A tensor made of an array holds
that array as long as anything looks at its storage, so an array that only the list here holds is free.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

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
