"""Weights and schedules of the objective against closed forms written another way, and against diffusers."""

import math

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from ldmscale.diffusion import process
from ldmscale.diffusion.process import NoiseSchedule

EVERY_TIMESTEP = torch.arange(1000)
BETAS = {"linear": (1e-4, 2e-2), "scaled_linear": (0.00085, 0.012), "cosine": (0.0001, 0.02)}


def schedule_of(kind: str, zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule.make(kind, 1000, *BETAS[kind], zero_terminal_snr)


@pytest.mark.parametrize("kind", list(BETAS))
def test_each_schedule_is_that_of_diffusers(kind):
    theirs = diffusers.DDPMScheduler(1000, *BETAS[kind], "squaredcos_cap_v2" if kind == "cosine" else kind)
    ours = schedule_of(kind).alphas_bar
    # diffusers multiplies a thousand factors in float32, which shows most where little is left.
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", list(BETAS))
def test_zero_terminal_snr_is_that_of_diffusers_and_keeps_the_first_timestep(kind):
    plain, ours = schedule_of(kind), schedule_of(kind, zero_terminal_snr=True)
    assert float(ours.alphas_bar[-1]) == 0 and not ours.has_terminal_signal and plain.has_terminal_signal
    assert float(ours.alphas_bar[0]) == pytest.approx(float(plain.alphas_bar[0]), rel=1e-12)
    betas = 1 - plain.alphas_bar / torch.cat([torch.ones(1), plain.alphas_bar[:-1]])
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(ours.alphas_bar, theirs, atol=1e-9, rtol=1e-7)
    # A straight line in sqrt(alpha_bar): any third timestep keeps its share of the way from first to last.
    share = lambda s: ((s[0] - s[400]) / (s[0] - s[-1])).item()  # noqa: E731
    assert share(ours.alphas_bar.sqrt()) == pytest.approx(share(plain.alphas_bar.sqrt()), rel=1e-9)


def test_snr_is_that_of_diffusers():
    theirs = compute_snr(
        diffusers.DDPMScheduler(1000, *BETAS["scaled_linear"], "scaled_linear"), EVERY_TIMESTEP
    )
    torch.testing.assert_close(
        schedule_of("scaled_linear").snr(EVERY_TIMESTEP).float(), theirs, atol=0, rtol=2e-4
    )


@pytest.mark.parametrize("kind", list(BETAS))
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_follow_their_closed_forms(kind, gamma):
    """Written with the tangent of the angle of the signal, of which SNR = 1 / tan^2 and SNR + 1 = 1 / sin^2."""
    schedule = schedule_of(kind)
    found = {p: process.min_snr_weight(schedule, p, EVERY_TIMESTEP, gamma) for p in ("eps", "v", "x0")}
    for t in (0, 1, 10, 250, 500, 900, 999):
        angle = math.acos(float(schedule.alphas_bar[t]) ** 0.5)
        capped = min(1 / math.tan(angle) ** 2, gamma)
        assert float(found["x0"][t]) == pytest.approx(capped, rel=1e-6)
        assert float(found["eps"][t]) == pytest.approx(capped * math.tan(angle) ** 2, rel=1e-6)
        assert float(found["v"][t]) == pytest.approx(capped * math.sin(angle) ** 2, rel=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_are_those_of_the_training_scripts_of_diffusers(prediction):
    """examples/text_to_image: min(SNR, gamma) over SNR, or over SNR + 1 for v."""
    schedule = schedule_of("scaled_linear")
    snr = compute_snr(diffusers.DDPMScheduler(1000, *BETAS["scaled_linear"], "scaled_linear"), EVERY_TIMESTEP)
    theirs = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
    theirs = theirs / (snr if prediction == "eps" else snr + 1)
    ours = process.min_snr_weight(schedule, prediction, EVERY_TIMESTEP, 5.0)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-4)


def test_a_wrong_answer_costs_the_same_whatever_is_predicted():
    """The three weights are one objective: a network's error of x0, told as eps, v or x0, has one weighted loss."""
    schedule = schedule_of("scaled_linear")
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0, 5, 100, 400, 700, 999])
    x0, noise, error = torch.randn(3, 6, 4, 8, 8, generator=generator, dtype=torch.float64)
    x_t = process.add_noise(schedule, x0, noise, t)
    believed = x0 + 0.1 * error
    believed_noise = (x_t - schedule.signal(t) * believed) / schedule.noise(t)
    costs = []
    for prediction in ("eps", "v", "x0"):
        answer = process.target(schedule, prediction, believed, believed_noise, t)
        wanted = process.target(schedule, prediction, x0, noise, t)
        weight = process.min_snr_weight(schedule, prediction, t, 5.0).double()
        costs.append((answer - wanted).square().flatten(1).mean(1) * weight)
    torch.testing.assert_close(costs[0], costs[2], atol=0, rtol=1e-5)
    torch.testing.assert_close(costs[1], costs[2], atol=0, rtol=1e-5)


def test_weights_at_the_ends_of_a_schedule_without_terminal_signal():
    schedule = schedule_of("scaled_linear", zero_terminal_snr=True)
    ends = torch.tensor([0, 999])
    assert process.min_snr_weight(schedule, "x0", ends, 5.0).tolist() == [5.0, 0.0]
    at_first, at_last = process.min_snr_weight(schedule, "v", ends, 5.0).tolist()
    assert at_first == pytest.approx(5 * (1 - 0.99915), rel=1e-4) and at_last == 0.0


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_targets_stay_finite_where_no_signal_is_left(prediction):
    schedule = schedule_of("scaled_linear", zero_terminal_snr=True)
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999])
    x_t = process.add_noise(schedule, x0, noise, t)
    assert torch.equal(x_t, noise)
    wanted = process.target(schedule, prediction, x0, noise, t)
    assert torch.equal(wanted, x0 if prediction == "x0" else -x0)
    found_x0, found_noise = process.split(schedule, prediction, wanted, x_t, t)
    assert torch.equal(found_x0, x0) and torch.equal(found_noise, noise)
