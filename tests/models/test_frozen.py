"""Judges of images are opened by name and hash, or refused: never another one in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldmscale.builders.feature_networks import build_distance, open_features, weights_file
from ldmscale.config import AutoencoderJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import read
from ldmscale.errors import ConfigError
from ldmscale.models.perceptual import EFFICIENTNET_LITE0_SHA256

CPU = torch.device("cpu")


def loss_with(**changes: object):
    values = compose_job("autoencoder", ["experiment=smoke"])
    return replace(read(AutoencoderJob, values).loss, **changes)


def test_another_file_than_expected_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "vgg.pth")
    given = {"perceptual": "lpips_vgg16", "perceptual_weights": str(tmp_path / "vgg.pth")}
    with pytest.raises(ConfigError, match="expected 397923af"):
        build_distance(loss_with(**given, perceptual_heads=str(tmp_path / "vgg.pth")), CPU)
    with pytest.raises(ConfigError, match="expected 12345678"):
        build_distance(loss_with(**given, perceptual_heads="x", perceptual_weights_sha256="12345678"), CPU)
    with pytest.raises(ConfigError, match="does not exist"):
        build_distance(
            loss_with(perceptual="lpips_vgg16", perceptual_weights="no", perceptual_heads="no"), CPU
        )
    assert build_distance(loss_with(perceptual="none"), CPU) is None


def test_a_name_of_the_hub_has_three_parts() -> None:
    with pytest.raises(ValueError, match="expected hf://OWNER/REPO/FILE"):
        weights_file("hf://owner/repo")


def test_features_tell_whose_they_are() -> None:
    features = open_features("efficientnet_lite0", None, None, CPU, key="evaluate.features")
    assert features is not None
    assert features.sha256 == EFFICIENTNET_LITE0_SHA256
    assert features(torch.zeros(2, 3, 32, 32)).shape == (2, features.width)
    with pytest.raises(ConfigError, match=r"evaluate.features=efficientnet_lite0: .*expected 00000000"):
        open_features("efficientnet_lite0", None, "00000000", CPU, key="evaluate.features")
