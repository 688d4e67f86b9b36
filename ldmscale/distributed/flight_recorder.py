"""Torch's flight recorder: the last collectives of each rank, written down when the training hangs.

`python -m torch.distributed.flight_recorder.fr_trace` reads the files of all ranks and names the collective that differs.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from torch._C import _distributed_c10d as c10d

_PREFIX = "nccl_trace_rank_"  # fr_trace's own default
_ENTRIES = "2000"  # collectives that are kept


def record_collectives(folder: Path, env: MutableMapping[str, str] = os.environ) -> None:
    """Has NCCL keep its last collectives, and write them to `folder` where its own watchdog ends the process.

    Before the process group is made.
    """
    env.setdefault("TORCH_FR_BUFFER_SIZE", env.get("TORCH_NCCL_TRACE_BUFFER_SIZE", _ENTRIES))
    env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    name = str(folder / _PREFIX)
    for variable in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        env.setdefault(variable, name)


def dump(folder: Path, rank: int) -> Path | None:
    """Writes what this rank has recorded to `folder`; None where torch records nothing here.

    Our watchdog ends a hanging process before NCCL's does, which would write it otherwise.
    """
    # The first is in builds with NCCL only; the other has what gloo did.
    made = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    if made is None:
        return None
    found: bytes = made()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{rank}"
    path.write_bytes(found)
    return path
