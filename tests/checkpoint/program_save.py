"""Run by torchrun on two ranks: saves that fail on one of them, damage, and what both ranks make of it.

Arguments: the file for rank 0's results, the folder of checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.shards import Piece
from ldmscale.errors import CheckpointError


def half(step: int, *, hole: bool = False, twice: bool = False) -> list[Piece]:
    """This rank's half of 10 elements; rank 1 may leave out one, or write its half twice."""
    rank = dist.get_rank()
    values = torch.arange(5.0) + 5 * rank + 100 * step
    piece = Piece("denoiser/master/w", (10,), 5 * rank, values[: 4 if hole and rank == 1 else 5])
    return [piece, piece] if twice and rank == 1 else [piece]


def message(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def main() -> None:
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[2])
    manager = CheckpointManager(folder)
    found: dict[str, Any] = {}

    def everywhere(name: str, value: Any) -> None:
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, value)
        found[name] = gathered

    manager.save(1, half(1), {"images_seen": 10})
    manager.save(2, half(2), {"images_seen": 20})
    everywhere("newest", manager.newest().name)  # type: ignore[union-attr]
    everywhere("hole", message(lambda: manager.save(3, half(3, hole=True), {})))
    everywhere("twice", message(lambda: manager.save(3, half(3, twice=True), {})))
    everywhere("left", sorted(path.name for path in folder.iterdir()))
    dist.barrier()
    if rank == 0:
        path = folder / "step_00000002" / "rank_00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    dist.barrier()
    everywhere("newest_after_flip", manager.newest().name)  # type: ignore[union-attr]
    dist.barrier()
    if rank == 0:
        os.unlink(folder / "step_00000001" / "rank_00000.safetensors")
    dist.barrier()
    everywhere("all_damaged", message(manager.newest))
    manager.save(3, half(3), {"images_seen": 30})
    everywhere("newest_in_the_end", manager.newest().name)  # type: ignore[union-attr]
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


main()
