"""`ldmscale index`: make or check the index of shards, and list what is damaged."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.config import IndexJob
from ldmscale.config.load import configured


def main(overrides: Sequence[str]) -> int:
    """Index as configured. 0 if every sample can be used, 2 if something is damaged."""
    config, ranks = configured(IndexJob, overrides)
    from ldmscale.setup.index_shards import index_shards

    return index_shards(config, ranks)
