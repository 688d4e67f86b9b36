"""`ldmscale quickstart`: the whole pipeline, small: real images, shards, autoencoder, latents, diffusion, samples, scores."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.config import QuickstartJob
from ldmscale.config.load import configured
from ldmscale.errors import ConfigError


def main(overrides: Sequence[str]) -> int:
    """Run or finish the pipeline; see `cli` for the exit status."""
    config, ranks = configured(QuickstartJob, overrides)
    if ranks.size > 1:
        raise ConfigError(
            f"quickstart starts its own ranks, but runs on {ranks.size}: start it as one process, ranks=N says how many"
        )
    from ldmscale.setup.quickstart import run_quickstart

    return run_quickstart(config)
