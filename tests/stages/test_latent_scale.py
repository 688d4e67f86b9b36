"""The latent scale against samples that are really drawn, and against its own inverse."""

import pytest
import torch

from ldmscale.models.first_stage import LatentScale
from ldmscale.stages.autoencoder import ScaleMeter


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 3, 8, 8, generator=generator) * torch.tensor([0.5, 1.0, 4.0])[:, None, None] + 2
    logvar = torch.randn(64, 3, 8, 8, generator=generator) - 1
    return mean, logvar


def test_the_meter_measures_what_posterior_samples_would_show():
    mean, logvar = drawn()
    meter = ScaleMeter(3)
    for part in range(4):
        meter.add(mean[part::4], logvar[part::4])
    found = meter.measured()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(50, *mean.shape, generator=generator, dtype=torch.float64)
    samples = mean + (logvar / 2).exp() * noise
    by_channel = samples.permute(2, 0, 1, 3, 4).flatten(1)
    assert found["channel_std"] == pytest.approx(by_channel.std(1).tolist(), rel=0.01)
    assert found["channel_mean"] == pytest.approx(by_channel.mean(1).tolist(), rel=0.01)
    assert found["factor"] == pytest.approx(1 / float(samples.std()), rel=0.01)
    assert found["positions"] == 64 * 8 * 8


@pytest.mark.parametrize("kind", ["factor", "channel"])
def test_scaled_latents_have_unit_variance_and_scale_back(kind):
    mean, logvar = drawn()
    meter = ScaleMeter(3)
    meter.add(mean, logvar)
    scale = LatentScale.of(meter.measured(), kind)
    scaled = scale.scale(mean)
    torch.testing.assert_close(scale.unscale(scaled), mean, atol=1e-4, rtol=1e-4)
    posterior = scale.scale(
        mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    )
    if kind == "channel":
        assert posterior.permute(1, 0, 2, 3).flatten(1).std(1).tolist() == pytest.approx([1, 1, 1], abs=0.03)
        assert posterior.permute(1, 0, 2, 3).flatten(1).mean(1).tolist() == pytest.approx([0, 0, 0], abs=0.05)
    else:
        assert float(posterior.std()) == pytest.approx(1, abs=0.03)
        assert scale.shift.abs().max() == 0


def test_a_published_factor_takes_the_place_of_the_measured_one():
    statistics = {"channel_mean": [1.0, 2.0], "channel_std": [3.0, 4.0], "factor": 0.5}
    scale = LatentScale.of(statistics, "channel", fixed_factor=0.18215)
    assert scale.plain() == {"shift": [0.0, 0.0], "factor": pytest.approx([0.18215, 0.18215])}
    back = LatentScale.from_plain(scale.plain())
    assert torch.equal(back.factor, scale.factor)
