"""Ranks that part: from a point on each works for itself, and the death of one does not concern the others.

Until then they wait for each other, at the rendezvous for instance, where a dead one is waited for in vain. Only the
launcher sees deaths, so a rank tells it when it has parted. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

PARTED = "LDMSCALE_PARTED"  # a folder; set by our launcher for ranks that will part


def part(rank: int, env: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher, if it is ours, that this rank waits for no other from now on."""
    if folder := env.get(PARTED):
        (Path(folder) / str(rank)).touch()


def have_parted(folder: Path, ranks: Iterable[int]) -> bool:
    """Whether all these ranks have."""
    return all((folder / str(rank)).exists() for rank in ranks)
