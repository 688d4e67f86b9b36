"""Perplexity, usage and alarm of choices that are known, on one rank without an engine's collectives."""

from __future__ import annotations

import logging

import pytest
import torch

from ldmscale.config.schema.losses import CodebookConfig
from ldmscale.models.autoencoder import VQAutoencoder
from ldmscale.stages.codebook import CodebookMonitor
from ldmscale.train.engine.engine import Engine
from ldmscale.train.engine.options import EngineOptions
from ldmscale.train.engine.process import connect, disconnect

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def engine():
    connect(DEVICE)
    network = VQAutoencoder(
        latent_channels=4, channels=8, channel_mult=(1,), blocks_per_level=1, norm_groups=4, codebook_size=8
    )
    yield Engine("generator", network, EngineOptions(0, "fp32", 1), DEVICE)
    disconnect()


def test_perplexity_usage_and_alarm_of_known_choices(engine, caplog):
    options = CodebookConfig(usage_window_steps=2, alarm_usage=0.2)
    keeper = CodebookMonitor(engine, averages=[], size=8, options=options, seed=0)
    metrics = keeper.count(torch.tensor([0, 1, 2, 3]).view(1, 2, 2), 0)
    assert float(metrics["codebook/perplexity"]) == pytest.approx(4.0), "n rows equally often"
    assert float(metrics["codebook/chosen"]) == 4 / 8
    assert float(metrics["codebook/alarm"]) == 0.0
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            metrics = keeper.count(torch.zeros(1, 2, 2, dtype=torch.int64), step)
    assert float(metrics["codebook/perplexity"]) == pytest.approx(1.0)
    assert float(metrics["codebook/usage"]) == 1 / 8
    assert float(metrics["codebook/alarm"]) == 1.0
    assert "the codebook collapses: 12.5% of its rows" in caplog.text
    assert keeper.idle.tolist() == [0, 3, 3, 3, 4, 4, 4, 4]
    again = CodebookMonitor(engine, averages=[], size=8, options=options, seed=0)
    again.restore(keeper.state())
    assert torch.equal(again.idle, keeper.idle)
