"""On a CPU: keep the memory that a training step frees, for the next step.

A step frees its activations and gradients, hundreds of MB. glibc then gives the top of its heap back to the
system, and the next step has to fault every page in again: on a virtual machine an eighth of the step of a 35 M
U-Net. GPUs have torch's caching allocator, which does the same as this.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_WHOLE = 32 << 20  # bytes, the most that glibc takes; larger blocks get a mapping of their own
_STEP = 64 << 20  # bytes that the heap grows by


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; False where the C library is another one, or refuses."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # Once one of the three is set, glibc adapts none of them by itself any more.
    return bool(
        mallopt(_MMAP_THRESHOLD, _WHOLE)
        and mallopt(_TOP_PAD, _STEP)
        and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    )


def give_back_freed_memory() -> bool:
    """Return to the system what is free now, which `keep_freed_memory` holds; False where the C library has no such call.

    For the moment when much is freed for good: the fp32 shards that a network is built in, before its bf16 ones and their
    masters take their place.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    malloc_trim.argtypes, malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    malloc_trim(0)
    return True
