"""Opens the frozen networks that judge images: by name, from weights whose hash is checked. Never another one in place.

Weights are a local file or `hf://OWNER/REPO/FILE`, which is fetched from the model hub and then checked like any file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.config import AutoencoderLossConfig
from ldmscale.errors import ConfigError
from ldmscale.models.efficientnet import HEAD_CHANNELS, EfficientNetLite0
from ldmscale.models.inception import FEATURES, SIDE, Inception
from ldmscale.models.perceptual import (
    EFFICIENTNET_LITE0_SHA256,
    LPIPS,
    VGG16_SHA256,
    EfficientNetLite0Distance,
    load_efficientnet_lite0,
    load_tensors,
    packaged_efficientnet,
    read_weights,
)
from ldmscale.storage.digest import file_sha256
from ldmscale.storage.hub import hub_file

HUB = "hf://"
# The first characters of its sha256 are in its published name.
INCEPTION_SHA256 = "6726825d"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, the network of Heusel et al. 2017"
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


@dataclass(frozen=True)
class Features:
    """A frozen network that describes images by vectors, [B,3,H,W] in [-1,1] -> [B,width]."""

    network: EfficientNetLite0 | Inception
    sha256: str  # of its weights
    side: int  # pixels that it takes
    width: int
    distance: str  # what a Frechet distance of them is called
    whole_bytes: bool  # images are rounded to 8 bits first, as saved pictures are

    @property
    def preparation(self) -> str:
        rounded = "rounded to 8 bits, " if self.whole_bytes else ""
        return f"{rounded}bilinear without antialiasing to {self.side}x{self.side}, pooled features"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.whole_bytes:
            images = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        resized = F.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.network.pooled(resized)


def open_features(
    name: str, weights: str | None, weights_sha256: str | None, device: torch.device, *, key: str
) -> Features | None:
    """The feature extractor called `name` (efficientnet_lite0, inception_fid or none); `key` is the setting that named it.

    The Frechet distance is called "fid" over the published Inception weights alone.
    Raises ConfigError where its weights are not to be had, or are others than expected.
    """
    if name == "none":
        return None
    network: EfficientNetLite0 | Inception
    try:
        if name == "inception_fid":
            if weights is None:
                raise ValueError(f"it needs the file of its weights ({INCEPTION}); give {key}_weights=FILE")
            path = weights_file(weights)
            sha256 = file_sha256(path) if path.is_file() else ""
            found = read_weights(path, weights_sha256 or INCEPTION_SHA256, INCEPTION)
            network = Inception()
            load_tensors(network, {k: v for k, v in found.items() if not k.startswith("fc.")}, path)
            published = sha256.startswith(INCEPTION_SHA256)
            distance = "fid" if published else f"frechet_distance_{name}"
            opened = Features(network, sha256, SIDE, FEATURES, distance, whole_bytes=True)
        else:
            path = packaged_efficientnet() if weights is None else weights_file(weights)
            network = load_efficientnet_lite0(
                path, weights_sha256=weights_sha256 or EFFICIENTNET_LITE0_SHA256
            )
            distance = f"frechet_distance_{name}"
            opened = Features(network, file_sha256(path), 224, HEAD_CHANNELS, distance, whole_bytes=False)
        network.requires_grad_(False).eval().to(device)
        return opened
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={name}: {error}") from error


def weights_file(given: str) -> Path:
    """The local file of a path or of hf://OWNER/REPO/FILE. Raises OSError or ValueError where there is none."""
    if not given.startswith(HUB):
        return Path(given)
    parts = given.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"{given}: expected hf://OWNER/REPO/FILE")
    try:
        return hub_file("/".join(parts[:2]), parts[2])
    except Exception as error:  # no network, no such repository, no right to it: each is told in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{given} cannot be fetched ({reason}): give the path of a file that is here"
        ) from error
