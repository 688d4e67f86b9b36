"""`ldmscale autoencoder`: fit the KL or VQ autoencoder; ends by measuring the latent scale."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ldmscale.config import AutoencoderJob
from ldmscale.config.load import configured
from ldmscale.distributed.preemption import StopFlag

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Train as configured; see `cli` for the exit status."""
    config, ranks = configured(AutoencoderJob, overrides)
    with StopFlag().install() as stop:  # before the slow imports: a signal may come at any time
        from ldmscale.setup.autoencoder import train_autoencoder

        return train_autoencoder(config, ranks, stop)
