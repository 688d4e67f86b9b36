"""The Gaussian bottleneck against torch.distributions, and the quantiser against a plain search."""

from __future__ import annotations

import torch
from parity import draw
from torch.distributions import Normal, kl_divergence

from ldmscale.models.bottleneck import Posterior, VectorQuantizer


def test_kl_is_the_divergence_from_the_standard_normal() -> None:
    posterior = Posterior.from_moments(draw(3, 4, 5, 5))
    expected = kl_divergence(Normal(posterior.mean, torch.exp(0.5 * posterior.logvar)), Normal(0.0, 1.0)).sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(posterior.kl(), expected)


def test_samples_are_mean_plus_deviation_times_noise() -> None:
    posterior = Posterior(torch.full((1, 1, 1, 2), 3.0), torch.tensor([0.0, 2.0]).view(1, 1, 1, 2))
    found = posterior.sample(torch.ones(1, 1, 1, 2))
    torch.testing.assert_close(found.flatten(), torch.tensor([4.0, 3.0 + torch.e]))


def test_log_variances_are_held_within_bounds_and_moments_come_back() -> None:
    moments = torch.tensor([1.0, 2.0, -99.0, 99.0]).view(1, 4, 1, 1)
    posterior = Posterior.from_moments(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    again = Posterior.from_moments(posterior.moments())
    assert torch.equal(again.mean, posterior.mean)
    assert torch.equal(again.logvar, posterior.logvar)


def test_quantiser_finds_the_nearest_row_and_passes_the_gradient_straight_through() -> None:
    quantiser = VectorQuantizer(32, 3)
    with torch.no_grad():
        quantiser.embedding.copy_(draw(32, 3))
    latent = draw(2, 3, 4, 4, seed=2).float().requires_grad_(True)
    codes = quantiser(latent)
    rows = latent.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(rows, quantiser.embedding.detach()).argmin(1)
    assert torch.equal(codes.indices.flatten(), nearest)
    torch.testing.assert_close(codes.quantized, quantiser.vectors(codes.indices))
    upstream = draw(2, 3, 4, 4, seed=3).float()
    (found,) = torch.autograd.grad(codes.quantized, latent, upstream)
    assert torch.equal(found, upstream)


def test_commitment_weighs_the_term_that_moves_the_table() -> None:
    quantiser = VectorQuantizer(1, 1, commitment=0.25)
    with torch.no_grad():
        quantiser.embedding.fill_(1.0)
    latent = torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    codes = quantiser(latent)
    codes.loss.backward()
    assert codes.loss.item() == 4.0 + 0.25 * 4.0
    assert latent.grad is not None and latent.grad.item() == 2 * 2.0
    assert quantiser.embedding.grad is not None and quantiser.embedding.grad.item() == 0.25 * -2 * 2.0
