"""SSIM and the Frechet distance against other ways to compute them, in double precision and plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldmscale.evaluation.held_out import HeldOut, NumberedBatch, shares
from ldmscale.evaluation.metrics import (
    FeatureSums,
    frechet_distance,
    frechet_distance_of_features,
    psnr,
    ssim,
)


def pictures(seed: int, count: int = 2, height: int = 20, width: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator) * 2 - 1


def ssim_by_windows(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, window by window, for one plane of bytes."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            both = (window * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_ssim_is_the_published_formula_window_by_window():
    a = pictures(0)
    b = (a + 0.3 * pictures(1)).clamp(-1, 1)
    planes = [((x.double() + 1) * 127.5).float().round().double().numpy() for x in (a, b)]
    expected = [
        np.mean([ssim_by_windows(planes[0][n, c], planes[1][n, c]) for c in range(3)]) for n in range(2)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[..., :10], b[..., :10])


def gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sums = FeatureSums(features.shape[1], torch.device("cpu"))
    for part in torch.split(features, 7):
        sums.add(part)
    return sums.gaussian()


@pytest.mark.parametrize("count", [200, 20])
def test_the_frechet_distance_is_that_of_the_eigenvalues_of_the_product(count):
    """Also with fewer samples than features, where the covariances are singular."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    a = torch.randn(count, 32, generator=generator, dtype=torch.float64) @ mix
    b = torch.randn(count, 32, generator=generator, dtype=torch.float64) @ mix.t() + 0.5
    found = [gaussian(x) for x in (a, b)]
    for (mean, covariance), x in zip(found, (a, b), strict=True):
        np.testing.assert_allclose(mean, x.mean(0), atol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x.numpy().T), atol=1e-10)
    (m1, c1), (m2, c2) = (tuple(part.numpy() for part in pair) for pair in found)
    roots = np.sqrt(np.clip(np.linalg.eigvals(c1 @ c2).real, 0, None))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum()
    # The eigenvalues of a singular product are rounding, and their roots are not: the independent way is the worse one.
    assert frechet_distance(*found) == pytest.approx(expected, rel=1e-9 if count == 200 else 1e-4)
    assert frechet_distance(found[0], found[0]) == pytest.approx(0.0, abs=1e-8 * np.trace(c1))
    # The short way, from the features, also with sets of unequal size.
    assert frechet_distance_of_features(a, b) == pytest.approx(frechet_distance(*found), rel=1e-9)
    fewer = b[: count // 2]
    assert frechet_distance_of_features(a, fewer) == pytest.approx(
        frechet_distance(found[0], gaussian(fewer)), rel=1e-9
    )


def test_the_frechet_distance_of_known_gaussians():
    """Independent directions: the sum of (m1 - m2)^2 + (s1 - s2)^2."""
    one = torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64))
    two = torch.ones(3, dtype=torch.float64), torch.diag(torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64))
    assert frechet_distance(one, two) == pytest.approx(3 + 4 + 1)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_every_image_is_one_ranks_and_batches_are_the_same_on_any_number_of_ranks(count, world):
    groups = [range(count), [count, count + 1, count + 2], []]  # images of three shapes
    ranks = [list(shares(groups, 2, rank, world)) for rank in range(world)]
    assert len({len(turns) for turns in ranks}) == 1, "every rank is called equally often"
    own = [(group, tuple(batch)) for turns in ranks for group, batch, counts in turns if counts]
    alone = [(group, tuple(batch)) for group, batch, _ in shares(groups, 2, 0, 1)]
    assert sorted(own) == alone
    assert sorted(number for _, batch in own for number in batch) == list(range(count + 3))
    assert all((number >= count) == (group == 1) for group, batch in own for number in batch)


def test_means_are_over_the_images_that_count():
    images = torch.randint(
        0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    batches = [NumberedBatch(images[:3], (0, 1, 2)), NumberedBatch(images[3:], (3, 4), True)]
    batches.append(NumberedBatch(images[:1], (0,), False))
    calls = []

    def darker(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * 0.5

    found = HeldOut(batches, lambda a, b: (a - b).abs().mean((1, 2, 3)), torch.device("cpu")).measure(darker)
    x = images.float() / 127.5 - 1
    assert calls == [3, 2, 1]
    assert found["psnr_db"] == pytest.approx(float(psnr(x, x * 0.5).double().mean()), abs=1e-5)
    assert found["ssim"] == pytest.approx(float(ssim(x, x * 0.5).mean()))
    assert found["perceptual"] == pytest.approx(float((x * 0.5).abs().mean()), abs=1e-6)
