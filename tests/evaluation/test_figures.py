"""PSNR and prompt following against cases whose answer is known."""

import math

import pytest
import torch

from ldmscale.evaluation.held_out import ReconstructionScores
from ldmscale.evaluation.metrics import prompt_following, psnr


def test_an_exact_reconstruction_is_left_out_of_the_mean_psnr_and_counted():
    images = -torch.ones(3, 3, 12, 12)  # bytes of 0
    made = images + torch.tensor([0.0, 1.0, 2.0])[:, None, None, None] / 127.5
    assert psnr(images, made)[0] == torch.inf
    scores = ReconstructionScores(None)
    scores.add([0, 1, 2], images, made)
    means = scores.means()
    # 20 log10(255 / 1) and 20 log10(255 / 2)
    assert means["psnr_db"] == pytest.approx((48.1308 + 42.1102) / 2, abs=1e-3) and means["exact_images"] == 1
    exact = ReconstructionScores(None)
    exact.add([0], images[:1], images[:1])
    assert exact.means() == {"ssim": 1.0, "exact_images": 1.0}


def test_psnr_of_one_grey_level_is_20_log_255():
    images = torch.full((2, 3, 4, 4), -1.0)
    found = psnr(images, images + torch.tensor([1 / 127.5, 2 / 127.5])[:, None, None, None])
    assert found.tolist() == pytest.approx([20 * math.log10(255), 20 * math.log10(255 / 2)], abs=1e-3)


def test_samples_equal_to_their_images_follow_perfectly():
    real = torch.rand(12, 3, 4, 4) * 2 - 1
    classes = ["a"] * 8 + ["b"] * 4
    found = prompt_following(real[[0, 9, 11]], [0, 9, 11], real, classes, nearest=3)
    assert (found.class_share, found.own_share, found.first_share) == (1.0, 1.0, 1.0)
    assert found.nearest_index == (0, 9, 11)
    assert found.class_chance == pytest.approx((8 + 4 + 4) / 12 / 3)
    assert found.own_chance == pytest.approx(3 / 12)


def test_samples_that_ignore_their_prompt_score_at_chance():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(200, 3, 4, 4, generator=generator)
    classes = [("a", "a", "a", "b", "c")[i % 5] for i in range(200)]
    shuffled = torch.randperm(200, generator=generator)
    found = prompt_following(real[shuffled], list(range(200)), real, classes)
    assert found.class_share == pytest.approx(found.class_chance, abs=0.1)
    assert found.own_share == pytest.approx(found.own_chance, abs=0.04)


def test_the_own_image_counts_within_the_nearest_only():
    real = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2) / 6
    found = prompt_following(real[[0]], [2], real, list("xxyyzz"), nearest=3)
    assert (found.own_share, found.class_share, found.first_share) == (1.0, 0.0, 0.0)
    assert prompt_following(real[[0]], [3], real, list("xxyyzz"), nearest=3).own_share == 0.0


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 prompts"):
        prompt_following(torch.zeros(1, 3, 2, 2), [0, 1], torch.zeros(4, 3, 2, 2), list("abcd"))
