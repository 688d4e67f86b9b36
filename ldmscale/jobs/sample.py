"""`ldmscale sample`: sample images for prompts, one PNG each with its parameters inside, and a grid of the first."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.config import SampleJob
from ldmscale.config.load import configured


def main(overrides: Sequence[str]) -> int:
    """Sample as configured; see `cli` for the exit status."""
    config, ranks = configured(SampleJob, overrides)
    from ldmscale.setup.sampling import sample_set

    sample_set(config.sample, ranks)
    return 0
