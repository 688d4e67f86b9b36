"""Timesteps of the validation loss: fixed, and spread evenly over any number of samples."""

import torch

from ldmscale.stages.validation import spread_timesteps


def test_timesteps_belong_to_samples_and_cover_the_schedule_evenly():
    together = spread_timesteps(range(256), 1000)
    assert torch.equal(spread_timesteps([7, 200], 1000), together[[7, 200]])
    assert together.min() >= 0 and together.max() < 1000
    for samples in (64, 256, 1000):
        counts = torch.histc(spread_timesteps(range(samples), 1000).float(), 10, 0, 1000)
        assert (counts - samples / 10).abs().max() <= 2  # random draws would be off by several times as much
