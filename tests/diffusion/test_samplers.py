"""Every sampler beside the scheduler of diffusers, on one network and one noise; settings of the schedulers as stated here.

All agree to 1e-4 of the largest value at most; diffusers' tables of alpha_bar are float32.
"""

import diffusers
import pytest
import torch
from torch import Tensor

from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.samplers import ddim, ddpm, dpmpp_2m, euler, plms
from ldmscale.diffusion.timesteps import path_of

PUBLISHED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIR_NAME = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
PREDICTIONS = list(THEIR_NAME)
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2)) / 6
START = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def schedule_of(zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(
        torch.nn.functional.conv2d(x, WEIGHT, padding=1) + t[:, None, None, None].float() / 1000
    )


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max()))
    assert float((theirs - START).abs().max()) > 0.1  # it went somewhere


def drawn(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(START.shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("steps", "eta"), [(10, 0.0), (50, 0.0), (20, 0.5), (20, 1.0)])
def test_ddim(prediction, steps, eta):
    """DDIMScheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False), which is CompVis' DDIMSampler."""
    theirs = diffusers.DDIMScheduler(
        **PUBLISHED, steps_offset=1, set_alpha_to_one=False, clip_sample=False, prediction_type=THEIR_NAME[prediction]
    )  # fmt: skip
    theirs.set_timesteps(steps)
    path = path_of("ddim", schedule_of(), steps)
    assert theirs.timesteps.tolist() == list(path.timesteps)
    x, noise = START, drawn(steps)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(network(x, t.expand(3)), t, x, eta=eta, variance_noise=noise[i]).prev_sample
    ours = ddim(network, START, path, prediction=prediction, eta=eta, fresh_noise=lambda i: noise[i])
    assert_equal(ours, x)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_ddim_from_a_terminal_step_without_signal(prediction, eta):
    """DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False).

    At eta=1 the scheduler takes the root of 1 - abar - (sqrt(1 - abar))^2, which rounds below zero on some processors and
    gives NaN there; our sampler must not.
    """
    theirs = diffusers.DDIMScheduler(
        **PUBLISHED, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        prediction_type=THEIR_NAME[prediction],
    )  # fmt: skip
    theirs.set_timesteps(20)
    path = path_of("ddim", schedule_of(zero_terminal_snr=True), 20)
    assert (
        theirs.timesteps.tolist() == list(path.timesteps) and path.timesteps[0] == 999 and path.bars[0] == 0
    )
    x, noise = START, drawn(20)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(network(x, t.expand(3)), t, x, eta=eta, variance_noise=noise[i]).prev_sample
    ours = ddim(network, START, path, prediction=prediction, eta=eta, fresh_noise=lambda i: noise[i])
    assert_equal(ours, x)
    whole = ddim(network, START, path, prediction=prediction, eta=1.0, fresh_noise=lambda i: noise[i])
    assert whole.isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [25, 1000])
def test_ddpm(prediction, steps):
    """DDPMScheduler(variance_type="fixed_small", clip_sample=False), its defaults otherwise."""
    theirs = diffusers.DDPMScheduler(**PUBLISHED, clip_sample=False, prediction_type=THEIR_NAME[prediction])
    theirs.set_timesteps(steps)
    path = path_of("ddpm", schedule_of(), steps)
    assert theirs.timesteps.tolist() == list(path.timesteps)
    x, generator = START, torch.Generator().manual_seed(5)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(3)), t, x, generator=generator).prev_sample
    again = torch.Generator().manual_seed(5)
    ours = ddpm(
        network, START, path, prediction=prediction,
        fresh_noise=lambda i: torch.randn(START.shape, generator=again),
    )  # fmt: skip
    assert_equal(ours, x)


def test_ddpm_is_ddim_of_eta_one():
    path = path_of("ddpm", schedule_of(), 25)
    noise = drawn(25)
    ours = ddpm(network, START, path, fresh_noise=lambda i: noise[i])
    torch.testing.assert_close(
        ours, ddim(network, START, path, eta=1.0, fresh_noise=lambda i: noise[i]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("steps", [8, 10, 50])
def test_plms(steps):
    """PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False), which is CompVis' PLMSSampler.

    Only eps: for v diffusers combines the raw answers of different timesteps, where the method combines noises.
    """
    theirs = diffusers.PNDMScheduler(**PUBLISHED, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    visited = []
    x = START
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(3)), t, x).prev_sample

    def watched(x: Tensor, t: Tensor) -> Tensor:
        visited.append(int(t[0]))
        return network(x, t)

    ours = plms(watched, START, path_of("plms", schedule_of(), steps))
    assert visited == theirs.timesteps.tolist()
    assert_equal(ours, x)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_plms_takes_what_a_network_predicts_to_the_noise(prediction):
    schedule = schedule_of()

    def same(x: Tensor, t: Tensor) -> Tensor:
        """The network's noise, told as `prediction`."""
        noise, signal, level = network(x, t), schedule.signal(t), schedule.noise(t)
        x0 = (x - level * noise) / signal
        return x0 if prediction == "x0" else signal * noise - level * x0

    path = path_of("plms", schedule, 20)
    assert_equal(plms(same, START, path, prediction=prediction), plms(network, START, path))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 8, 30])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpmpp_2m(prediction, steps, spacing):
    """DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"), its defaults."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        **PUBLISHED, prediction_type=THEIR_NAME[prediction], timestep_spacing=spacing
    )
    theirs.set_timesteps(steps)
    path = path_of("dpmpp_2m", schedule_of(), steps, spacing)
    assert theirs.timesteps.tolist() == list(path.timesteps)
    x = START
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(3)), t, x).prev_sample
    assert_equal(dpmpp_2m(network, START, path, prediction=prediction), x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 30])
def test_euler(prediction, spacing, steps):
    """EulerDiscreteScheduler(steps_offset=1), its defaults otherwise (linspace, linear interpolation, final sigma 0).

    diffusers' sample is ours times sqrt(sigma^2 + 1); both begin with the same noise, as large as init_noise_sigma says.
    """
    theirs = diffusers.EulerDiscreteScheduler(
        **PUBLISHED, prediction_type=THEIR_NAME[prediction], timestep_spacing=spacing, steps_offset=1
    )
    theirs.set_timesteps(steps)
    path = path_of("euler", schedule_of(), steps, spacing)
    assert theirs.timesteps.tolist() == pytest.approx(list(path.timesteps), abs=1e-3)
    x = START * theirs.init_noise_sigma
    for t in theirs.timesteps:
        x = theirs.step(network(theirs.scale_model_input(x, t), t.expand(3)), t, x).prev_sample
    ours = euler(network, START * path.start, path, prediction=prediction)
    assert_equal(ours, x)


def test_the_published_timesteps():
    schedule = schedule_of()
    assert path_of("ddim", schedule, 50).timesteps == tuple(float(t + 1) for t in range(980, -1, -20))
    assert path_of("ddim", schedule, 50).bars[-1] == pytest.approx(0.99915)
    assert path_of("ddpm", schedule, 1000).timesteps == tuple(float(t) for t in range(999, -1, -1))
    assert path_of("dpmpp_2m", schedule, 8).timesteps == (999, 874, 749, 624, 500, 375, 250, 125)
    for sampler in ("ddim", "plms", "euler", "dpmpp_2m", "ddpm"):
        path = path_of(sampler, schedule, 30, "trailing")
        assert len(path) == 30 and path.timesteps[0] == 999 and path.bars[-1] == 1
    assert len(path_of("plms", schedule, 30)) == 30


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_schedule_without_terminal_signal_is_begun_at_its_end(sampler, prediction):
    path = path_of(sampler, schedule_of(zero_terminal_snr=True), 12)
    assert path.timesteps[0] == 999 and path.bars[0] == 0
    function = {"ddim": ddim, "euler": euler, "dpmpp_2m": dpmpp_2m}.get(sampler)
    if function is None:
        noise = drawn(12)
        x = ddpm(network, START, path, prediction=prediction, fresh_noise=lambda i: noise[i])
    else:
        x = function(network, START, path, prediction=prediction)
    assert torch.isfinite(x).all()
    # The same from the last but a trace of signal: nothing jumps at zero.
    trace = schedule_of(zero_terminal_snr=True).alphas_bar.clone()
    trace[-1] = 1e-12
    path = path_of(sampler, NoiseSchedule(trace), 12, "trailing")
    if function is None:
        near = ddpm(network, START, path, prediction=prediction, fresh_noise=lambda i: noise[i])
    else:
        near = function(network, START, path, prediction=prediction)
    # The second step of dpmpp_2m extrapolates over a difference of log-SNR, which grows as slowly as a logarithm.
    close = 1e-3 if sampler == "dpmpp_2m" else 1e-4
    torch.testing.assert_close(x, near, atol=close, rtol=close)


@pytest.mark.parametrize(
    ("sampler", "zero", "steps", "spacing", "told"),
    [
        ("ddim", False, 1000, None, "1 to 999"),
        ("ddpm", False, 1001, None, "1 to 1000"),
        ("ddim", False, 0, None, "1 to 999"),
        ("heun", False, 10, None, "expected one of ddpm, ddim"),
        ("ddim", False, 10, "karras", "expected one of leading"),
        ("plms", True, 10, None, "noise alone"),
        ("ddim", True, 10, "leading", "begins before it"),
    ],
)
def test_paths_that_cannot_be_are_refused(sampler, zero, steps, spacing, told):
    with pytest.raises(ValueError, match=told):
        path_of(sampler, schedule_of(zero), steps, spacing)


def test_samplers_refuse_what_they_cannot_follow():
    without_signal = path_of("ddim", schedule_of(zero_terminal_snr=True), 5)
    with pytest.raises(ValueError, match="fresh_noise"):
        ddim(network, START, path_of("ddim", schedule_of(), 5), eta=1.0)
    with pytest.raises(ValueError, match="no signal"):
        ddim(network, START, without_signal, prediction="eps")
    with pytest.raises(ValueError, match="noise alone"):
        plms(network, START, without_signal, prediction="v")


@pytest.mark.parametrize("function", [ddim, euler, plms, dpmpp_2m])
def test_the_end_of_a_path_is_its_last_steps(function):
    """From the 6th of 10 levels on, beginning at what the whole path has there, the one-step samplers end alike."""
    path = path_of("ddim", schedule_of(), 10, "trailing")
    seen = []
    whole = function(network, START, path, keep=lambda x, bar: seen.append((x, bar)) or x)
    assert [bar for _, bar in seen] == list(path.bars[1:])
    end = path.last(4)
    assert end.timesteps == path.timesteps[6:] and end.bars == path.bars[6:] and len(end) == 4
    rest = function(network, seen[5][0], end)
    if function in (ddim, euler):
        assert torch.equal(rest, whole)
    else:  # they begin anew without their memory
        assert 0 < (rest - whole).abs().max() < 0.3
