"""`ldmscale latents`: encode shards of images into shards of latents. Any number of processes share the work."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.config import LatentsJob
from ldmscale.config.load import configured
from ldmscale.distributed.preemption import StopFlag


def main(overrides: Sequence[str]) -> int:
    """Encode as configured; see `cli` for the exit status."""
    config, ranks = configured(LatentsJob, overrides)
    with StopFlag().install() as stop:  # before the slow imports: a signal may come at any time
        from ldmscale.setup.latents import encode_latents

        return encode_latents(config, ranks, stop)
