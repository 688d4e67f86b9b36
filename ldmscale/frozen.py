"""Opens the frozen networks that judge images: by name, from weights whose hash is checked. Never another one in place.

Weights are a local file or `hf://OWNER/REPO/FILE`, which is fetched from the model hub and then checked like any file.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.config import AutoencoderLossConfig
from ldmscale.errors import ConfigError
from ldmscale.models.efficientnet import HEAD_CHANNELS, EfficientNetLite0
from ldmscale.models.perceptual import (
    EFFICIENTNET_LITE0_SHA256,
    LPIPS,
    VGG16_SHA256,
    EfficientNetLite0Distance,
    file_sha256,
    load_efficientnet_lite0,
    packaged_efficientnet,
)

HUB = "hf://"
Distance = LPIPS | EfficientNetLite0Distance


def build_distance(config: AutoencoderLossConfig, device: torch.device) -> Distance | None:
    """The frozen perceptual distance that the loss names, on `device`; None where it asks for none.

    Raises ConfigError where its weights are not to be had, or are others than expected.
    """
    return open_distance(
        config.perceptual,
        config.perceptual_weights,
        config.perceptual_weights_sha256,
        config.perceptual_heads,
        config.perceptual_min_side,
        device,
        key="loss.perceptual",
    )


def open_distance(
    name: str,
    weights: str | None,
    weights_sha256: str | None,
    heads: str | None,
    min_side: int,
    device: torch.device,
    *,
    key: str,
) -> Distance | None:
    """The distance called `name` (lpips_vgg16, efficientnet_lite0 or none); `key` is the setting that named it.

    Raises ConfigError where its weights are not to be had, or are others than expected.
    """
    if name == "none":
        return None
    try:
        backbone = None if weights is None else weights_file(weights)
        if name == "efficientnet_lite0":
            sha256 = weights_sha256 or EFFICIENTNET_LITE0_SHA256
            return EfficientNetLite0Distance(backbone, weights_sha256=sha256, min_side=min_side).to(device)
        if backbone is None or heads is None:
            raise ValueError("it needs the files of its backbone and of its heads")
        return LPIPS(backbone, weights_file(heads), weights_sha256=weights_sha256 or VGG16_SHA256).to(device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={name}: {error}") from error


class Features:
    """A frozen network that describes images by vectors, [B,3,H,W] in [-1,1] -> [B,width]."""

    def __init__(self, network: EfficientNetLite0, sha256: str, side: int) -> None:
        self.network, self.sha256, self.side = network, sha256, side
        self.width = HEAD_CHANNELS
        self.preparation = f"bilinear without antialiasing to {side}x{side}, pooled features"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.network.pooled(resized)


def open_features(
    name: str, weights: str | None, weights_sha256: str | None, device: torch.device, *, key: str
) -> Features | None:
    """The feature extractor called `name` (efficientnet_lite0 or none); `key` is the setting that named it.

    Raises ConfigError where its weights are not to be had, or are others than expected.
    """
    if name == "none":
        return None
    try:
        path = packaged_efficientnet() if weights is None else weights_file(weights)
        network = load_efficientnet_lite0(path, weights_sha256=weights_sha256 or EFFICIENTNET_LITE0_SHA256)
        network.requires_grad_(False).to(device)
        return Features(network, file_sha256(path), 224)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={name}: {error}") from error


def weights_file(given: str) -> Path:
    """The local file of a path or of hf://OWNER/REPO/FILE. Raises OSError or ValueError where there is none."""
    if not given.startswith(HUB):
        return Path(given)
    parts = given.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"{given}: expected hf://OWNER/REPO/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except Exception as error:  # no network, no such repository, no right to it: each is told in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{given} cannot be fetched ({reason}): give the path of a file that is here"
        ) from error
