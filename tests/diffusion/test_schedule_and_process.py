"""The schedule against closed forms, the process against its own inverse, both against diffusers where it has them."""

import itertools
import math

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldmscale.diffusion import process
from ldmscale.diffusion.guidance import guide, guided, needed, rescale
from ldmscale.diffusion.process import NoiseSchedule


def published() -> NoiseSchedule:
    return NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012)


def test_the_published_text_to_image_schedule_has_its_measured_values():
    """reference values of the released 1.45B configuration: alpha-bar at 0, 499 and 999."""
    bars = published().alphas_bar
    assert bars[0] == pytest.approx(0.99915, abs=1e-8)
    assert bars[499] == pytest.approx(0.27766965, rel=2e-6)
    assert bars[999] == pytest.approx(4.6600985e-3, rel=2e-6)


def test_a_linear_schedule_is_the_product_of_its_closed_form():
    bars = NoiseSchedule.make("linear", 100, 1e-4, 2e-2).alphas_bar
    product = 1.0
    for t in range(100):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * t / 99)
        assert bars[t] == pytest.approx(product, rel=1e-12)


def test_the_cosine_schedule_follows_its_signal_until_the_clip():
    bars = NoiseSchedule.make("cosine", 1000, 0.0, 0.0).alphas_bar

    def signal(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 100, 500, 900):
        assert bars[t] == pytest.approx(signal((t + 1) / 1000) / signal(0), rel=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_target_inverts_to_image_and_noise(prediction):
    schedule = published()
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 1, 250, 500, 750, 999])
    x_t = process.add_noise(schedule, x0, noise, t)
    answer = process.target(schedule, prediction, x0, noise, t)
    found_x0, found_noise = process.split(schedule, prediction, answer, x_t, t)
    torch.testing.assert_close(found_x0, x0, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found_noise, noise, atol=2e-3, rtol=1e-3)


def test_noise_and_velocity_are_those_of_diffusers():
    schedule = published()
    theirs = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    x0, noise = torch.randn(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 3, 333, 777, 999])
    torch.testing.assert_close(
        process.add_noise(schedule, x0, noise, t), theirs.add_noise(x0, noise, t), atol=2e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        process.target(schedule, "v", x0, noise, t), theirs.get_velocity(x0, noise, t), atol=2e-6, rtol=1e-5
    )


def test_guidance_moves_away_from_the_unconditional_prediction():
    calls = []

    def denoise(x, t, numbers):
        calls.append(len(x))
        return x + torch.tensor(numbers).repeat_interleave(2)[:, None, None, None]

    x, t = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    assert guided(denoise, [4.0])(x, t).unique().tolist() == [4.0]
    assert guided(denoise, [1.0])(x, t).unique().tolist() == [1.0]
    assert calls == [4, 2]  # both halves as one batch; the condition alone at scale 1


def linear(x, t, numbers):
    """A toy that adds 1, 10 and 100 for each condition that it is told."""
    told = [torch.tensor([0.0, 10.0, 110.0, 1110.0])[number] + 1 for number in numbers]
    return x + torch.stack(told).repeat_interleave(len(x) // len(numbers))[:, None]


@pytest.mark.parametrize("scales", list(itertools.product([0.0, 1.0, 5.0], repeat=3)))
def test_each_of_several_conditions_has_its_own_scale(scales):
    x, t = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2)
    expected = 1 + sum(scale * worth for scale, worth in zip(scales, (10, 100, 1000), strict=True))
    torch.testing.assert_close(guided(linear, scales)(x, t), torch.full_like(x, expected))


def test_predictions_that_cancel_are_not_computed():
    assert needed([]) == ([0], [])
    assert needed([1.0]) == ([1], [])
    assert needed([1.0, 5.0]) == ([1, 2], [5.0])
    assert needed([1.5, 5.0]) == ([0, 1, 2], [1.5, 5.0])
    assert needed([3.0, 3.0]) == ([0, 2], [3.0])
    assert needed([1.0, 1.0, 1.0]) == ([3], [])


def test_each_condition_and_both_are_dropped_as_often_as_guidance_needs():
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    context = process.drop_mask(uniform, 0.1)
    spatial = process.spatial_drop_mask(uniform, 0.1, 0.1)
    found = [(context & ~spatial), (context & spatial), (~context & spatial)]
    assert [int(part.sum()) for part in found] == [50, 50, 50]
    assert int(process.spatial_drop_mask(uniform, 0.0, 0.2).sum()) == 200
    assert not process.spatial_drop_mask(uniform, 0.1, 0.0).any()


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(share):
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wide = guide(unconditional, conditional, 7.5)
    ours = rescale(wide, conditional, share)
    theirs = rescale_noise_cfg(wide, conditional, guidance_rescale=share)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if share == 1.0:  # the spread of the conditional prediction, each sample's own
        torch.testing.assert_close(ours.flatten(1).std(1), conditional.flatten(1).std(1))
    closed = guided(lambda x, t, numbers: torch.cat([unconditional, conditional]), [7.5], share)
    torch.testing.assert_close(closed(wide, torch.zeros(3)), ours)


def test_uniform_timesteps_cover_all_and_no_other():
    t = process.uniform_timesteps(torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1], 1000)
    assert t.unique().tolist() == list(range(1000))


def test_loss_is_a_mean_over_each_sample():
    output = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]])
    assert process.loss_per_sample(output, torch.zeros_like(output), "l2").tolist() == [5.0, 0.0]
    assert process.loss_per_sample(output, torch.zeros_like(output), "l1").tolist() == [2.0, 0.0]
