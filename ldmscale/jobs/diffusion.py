"""`ldmscale diffusion`: train the conditional model on latents, or online from images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldmscale.config import DiffusionJob, FrozenTextConfig
from ldmscale.config.load import configured
from ldmscale.distributed.preemption import StopFlag

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Train as configured; see `cli` for the exit status."""
    config, ranks = configured(DiffusionJob, overrides)
    if config.first_stage.path is not None:
        # Whoever loads this run later may stand in another folder.
        found = replace(config.first_stage, path=str(Path(config.first_stage.path).absolute()))
        config = replace(config, first_stage=found)
    text = config.text_encoder
    if isinstance(text, FrozenTextConfig) and Path(text.path).is_dir():
        config = replace(config, text_encoder=replace(text, path=str(Path(text.path).absolute())))
    with StopFlag().install() as stop:  # before the slow imports: a signal may come at any time
        from ldmscale.setup.diffusion import train_diffusion

        return train_diffusion(config, ranks, stop)
