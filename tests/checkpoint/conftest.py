"""Small checkpoints to write, damage and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmscale.checkpoint.folders import Retention
from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.shards import Piece

Save = Callable[..., Path]


def pieces(step: int) -> list[Piece]:
    """One network of two parameters and a counter, whose values tell the step."""
    weight = torch.arange(12, dtype=torch.float32) + 100 * step
    return [
        Piece("denoiser/master/conv.weight", (3, 4), 0, weight),
        Piece("denoiser/ema/conv.weight", (3, 4), 0, weight / 2),
        Piece("denoiser/frozen/scale", (), 0, torch.tensor([0.5], dtype=torch.bfloat16)),
        Piece("denoiser/buffer/count", (), 0, torch.tensor([step])),
        Piece("process/rng/cpu_00000", (2,), 0, torch.tensor([1, 2], dtype=torch.uint8)),
    ]


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", retention=Retention(keep_last=3))


@pytest.fixture
def save(manager: CheckpointManager) -> Save:
    def save_step(step: int, **state: Any) -> Path:
        return manager.save(step, pieces(step), {"step": step, "images_seen": 4 * step, **state})

    return save_step
