"""One batch of the denoising objective: its draws belong to samples, its terms are what their papers say."""

import pytest
import torch

from ldmscale.config import DiffusionJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.data.loading.draws import BatchDraws, Draws
from ldmscale.diffusion import process
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.distributed import rng as draws
from ldmscale.setup.diffusion import warn_of_untrained
from ldmscale.stages.objective import Objective, add_noise, denoising_loss

SCHEDULE = NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012)
POSITIONS = list(range(100, 164))
X0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def noise_in(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x_t - SCHEDULE.signal(t) * X0) / SCHEDULE.noise(t)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_without_extras_it_is_plain_denoising(prediction):
    noisy = add_noise(Objective(prediction, "l2", 0.1), SCHEDULE, X0, POSITIONS, seed=3)
    noise = draws.normal(3, POSITIONS, "noise", X0.shape[1:])
    t = process.uniform_timesteps(draws.uniform(3, POSITIONS, "timestep"), 1000)
    assert torch.equal(noisy.t, t) and torch.equal(noisy.t_cpu, t)
    assert torch.equal(noisy.x_t, process.add_noise(SCHEDULE, X0, noise, t))
    assert torch.equal(noisy.target, process.target(SCHEDULE, prediction, X0, noise, t))


def test_offset_noise_adds_one_draw_a_channel_to_input_and_target():
    plain = add_noise(Objective("eps", "l2", 0.1), SCHEDULE, X0, POSITIONS, seed=3)
    offset = add_noise(Objective("eps", "l2", 0.1, offset_noise=0.5), SCHEDULE, X0, POSITIONS, seed=3)
    added = offset.target - plain.target
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    assert float(added[:, :, 0, 0].std()) == pytest.approx(0.5, rel=0.15)
    torch.testing.assert_close(noise_in(offset.x_t, offset.t), offset.target, atol=5e-4, rtol=1e-3)


def test_input_perturbation_reaches_the_input_and_not_the_target():
    plain = add_noise(Objective("v", "l2", 0.1), SCHEDULE, X0, POSITIONS, seed=3)
    perturbed = add_noise(Objective("v", "l2", 0.1, input_perturbation=0.1), SCHEDULE, X0, POSITIONS, seed=3)
    assert torch.equal(plain.target, perturbed.target)
    added = noise_in(perturbed.x_t, perturbed.t) - noise_in(plain.x_t, plain.t)
    assert float(added.std()) == pytest.approx(0.1, rel=0.03)
    assert abs(float(added.mean())) < 0.005


def test_every_draw_belongs_to_the_sample_and_not_to_its_batch():
    objective = Objective("v", "l2", 0.1, offset_noise=0.1, input_perturbation=0.1)
    together = add_noise(objective, SCHEDULE, X0, POSITIONS, seed=3)
    apart = add_noise(objective, SCHEDULE, X0[[9, 2]], [POSITIONS[9], POSITIONS[2]], seed=3)
    assert torch.equal(apart.x_t, together.x_t[[9, 2]]) and torch.equal(apart.target, together.target[[9, 2]])


def test_given_timesteps_take_the_place_of_drawn_ones():
    given = torch.full((64,), 7)
    noisy = add_noise(Objective("eps", "l2", 0.1), SCHEDULE, X0, POSITIONS, seed=3, timesteps=given)
    assert torch.equal(noisy.t, given)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_weighted_loss_and_its_bins_are_means_written_out(prediction):
    objective = Objective(prediction, "l2", 0.1, weighting="min_snr", min_snr_gamma=5.0, loss_bins=10)
    noisy = add_noise(objective, SCHEDULE, X0, POSITIONS, seed=3)
    output = noisy.target + torch.randn(X0.shape, generator=torch.Generator().manual_seed(1))
    loss, measured = denoising_loss(objective, SCHEDULE, noisy, output)
    losses = [float((output[i] - noisy.target[i]).square().mean()) for i in range(64)]
    total, bins = 0.0, {}
    for t, one in zip(noisy.t.tolist(), losses, strict=True):
        bar = float(SCHEDULE.alphas_bar[t])
        snr = bar / (1 - bar)
        total += one * min(snr, 5.0) / {"eps": snr, "v": snr + 1, "x0": 1.0}[prediction]
        bins.setdefault(f"loss/bin_{t // 100 + 1}", []).append(one)
    assert float(loss) == pytest.approx(total / 64, rel=1e-5)
    assert float(measured.pop("loss/unweighted")) == pytest.approx(sum(losses) / 64, rel=1e-5)
    assert set(measured) == set(bins) and len(bins) > 5
    for key, own in bins.items():
        assert measured[key].samples == len(own)
        assert float(measured[key].value) == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_a_terminal_step_that_is_never_trained_is_reported(caplog):
    def configuration(*overrides: str):
        values = compose_job("diffusion", ["experiment=smoke", "diffusion=v", *overrides])
        return read(DiffusionJob, values)

    warn_of_untrained(configuration("diffusion.zero_terminal_snr=true"))
    assert not caplog.records
    warn_of_untrained(configuration("diffusion.zero_terminal_snr=true", "diffusion.weighting=min_snr"))
    assert "never trained" in caplog.text


@pytest.mark.parametrize(
    "objective",
    [Objective("eps", "l2", 0.1), Objective("v", "l2", 0.1, offset_noise=0.5, input_perturbation=0.1)],
)
def test_noise_that_comes_with_the_batch_is_that_which_is_drawn_here(objective: Objective) -> None:
    batch: dict[str, torch.Tensor] = {"position": torch.tensor(POSITIONS), "latent": X0}
    made = BatchDraws(
        3, X0.shape[1], 1, normal=("noise", "perturbation"), per_channel=("offset",), uniform=("timestep",)
    )
    batch |= made.of(batch)
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    expected = add_noise(objective, SCHEDULE, X0, POSITIONS, seed=3)
    found = add_noise(objective, SCHEDULE, X0, POSITIONS, seed=3, drawn=Draws.of(batch, 3))
    assert torch.equal(found.x_t, expected.x_t) and torch.equal(found.target, expected.target)
    assert torch.equal(found.t, expected.t) and torch.equal(found.t_cpu, expected.t_cpu)
    assert all(
        torch.equal(batch[name], tensor) for name, tensor in kept.items()
    )  # nothing is written into it
    # They are read from the batch, not drawn again.
    batch["draw/noise"] = batch["draw/noise"] + 1
    other = add_noise(objective, SCHEDULE, X0, POSITIONS, seed=3, drawn=Draws.of(batch, 3))
    assert not torch.equal(other.x_t, expected.x_t)
