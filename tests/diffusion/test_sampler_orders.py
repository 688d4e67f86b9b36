"""On a Gaussian the best prediction and the exact solution are known: each sampler approaches it with its own order."""

import math

import pytest
import torch
from torch import Tensor

from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.samplers import ddim, ddpm, dpmpp_2m, euler, plms
from ldmscale.diffusion.timesteps import Path, path_of

MEAN, SPREAD = 0.7, 0.4  # of the data: x0 is normal with this mean and standard deviation
FINE = NoiseSchedule.make("scaled_linear", 100_000, 8.5e-6, 1.2e-4)


def variance_at(bar: float) -> float:
    return bar * SPREAD**2 + 1 - bar


def best(schedule: NoiseSchedule, prediction: str):
    """The network that cannot be improved: E[x0 | x_t], told as `prediction`."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        bar = float(schedule.alphas_bar[int(t[0])])
        x0 = MEAN + bar**0.5 * SPREAD**2 / variance_at(bar) * (x - bar**0.5 * MEAN)
        noise = (x - bar**0.5 * x0) / (1 - bar) ** 0.5
        return {"eps": noise, "x0": x0, "v": bar**0.5 * noise - (1 - bar) ** 0.5 * x0}[prediction]

    return denoise


def exact(x: Tensor, begin: float, end: float) -> Tensor:
    """The probability flow keeps every point at its quantile of the (Gaussian) distribution of its noise level."""
    quantile = (x - begin**0.5 * MEAN) / variance_at(begin) ** 0.5
    return end**0.5 * MEAN + variance_at(end) ** 0.5 * quantile


def between(steps: int) -> Path:
    """Evenly spaced timesteps within the schedule, so that no step ends where log-SNR is infinite."""
    visited = torch.linspace(90_000, 15_000, steps + 1).round().long()
    return Path(tuple(float(t) for t in visited[:-1]), tuple(float(bar) for bar in FINE.alphas_bar[visited]))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(("function", "order"), [(ddim, 1), (euler, 1), (plms, 2), (dpmpp_2m, 2)])
def test_each_sampler_converges_with_its_order(function, order, prediction):
    x = torch.linspace(-3, 3, 101, dtype=torch.float64).reshape(1, 1, 1, 101)
    denoise = best(FINE, prediction)

    def in_double(x: Tensor, t: Tensor) -> Tensor:
        answer = denoise(x, t)
        answer.float = lambda: answer  # samplers work in float32; here rounding would hide the order
        return answer

    errors = []
    for steps in (64, 128, 256):
        path = between(steps)
        wanted = exact(x, path.bars[0], path.bars[-1])
        errors.append(float((function(in_double, x, path, prediction=prediction) - wanted).abs().max()))
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert errors[-1] < (5e-3 if order == 1 else 2e-5)
    assert rates[-1] > order - 0.2, (errors, rates)
    if order == 1:
        assert rates[-1] < 1.3, (errors, rates)  # and no more: the test can tell the orders apart


@pytest.mark.parametrize("sampler", ["ddim", "euler", "plms", "dpmpp_2m"])
def test_whole_paths_end_at_the_data(sampler):
    """From pure noise to the image by the published spacings: mean and spread of the data come out."""
    schedule = NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012)
    x = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    function = {"ddim": ddim, "euler": euler, "plms": plms, "dpmpp_2m": dpmpp_2m}[sampler]
    # spacing by whole timesteps: the best network is known at those
    path = path_of(sampler, schedule, 100, "trailing" if sampler == "euler" else None)
    found = function(best(schedule, "eps"), x, path)
    # The start is not of the right mean (sqrt(alpha_bar_T) = 0.068 of it is missing), and the end not wholly clean.
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(found.std()) == pytest.approx(SPREAD, abs=0.02)


@pytest.mark.parametrize("function", [ddpm, ddim])
def test_stochastic_samplers_draw_from_the_data_the_better_the_more_steps(function):
    """DDPM, and DDIM of eta 1: moments of 65,536 draws."""
    schedule = NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for steps in (10, 100, 1000):
        x = torch.randn(1, 1, 256, 256, generator=generator)
        more = {} if function is ddpm else {"eta": 1.0}
        path = path_of("ddpm", schedule, steps)
        found = function(
            best(schedule, "eps"),
            x,
            path,
            fresh_noise=lambda step: torch.randn(x.shape, generator=generator),  # noqa: B023
            **more,
        )
        errors.append(abs(float(found.std()) - SPREAD))
        assert float(found.mean()) == pytest.approx(MEAN, abs=0.03)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01
