"""Saves checkpoints with copies to a store, and waits for each upload. Arguments: folder, URL, steps (1,2), megabytes.

With several ranks each writes its share.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.shards import Piece

folder, url, megabytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[4])
if "RANK" in os.environ:
    dist.init_process_group("gloo")
manager = CheckpointManager(folder, url=url)
for step in map(int, sys.argv[3].split(",")):
    values = torch.full((megabytes << 18,), float(step))
    piece = Piece(
        "denoiser/master/w", (manager.world_size * values.numel(),), manager.rank * values.numel(), values
    )
    manager.save(step, [piece], {"step": step})
    manager.finish(uploads=True)
