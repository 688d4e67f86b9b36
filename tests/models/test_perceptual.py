"""Perceptual distances: the right files, the published formula, real weights, frozen for good."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ldmscale.models.perceptual import LPIPS, EfficientNetLite0Distance, load_efficientnet_lite0

VGG_CHANNELS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
VGG_CHANNELS |= {17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files with the names and shapes of the published ones and random values."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    vgg: dict[str, Tensor] = {"classifier.0.weight": torch.zeros(2, 2)}
    current = 3
    for layer, channels in VGG_CHANNELS.items():
        weight = torch.randn(channels, current, 3, 3, generator=generator) * (2 / (9 * current)) ** 0.5
        vgg |= {f"features.{layer}.weight": weight, f"features.{layer}.bias": torch.full((channels,), 0.01)}
        current = channels
    save_file(vgg, folder / "vgg16.safetensors")
    widths = enumerate((64, 128, 256, 512, 512))
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in widths}
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg16.safetensors", folder / "heads.pth"


@pytest.fixture(scope="module")
def lpips(lpips_files: tuple[Path, Path]) -> LPIPS:
    return LPIPS(*lpips_files, weights_sha256=None, heads_sha256=None)


@pytest.fixture(scope="module")
def distance() -> EfficientNetLite0Distance:
    return EfficientNetLite0Distance()


def images(seed: int, size: int = 32) -> Tensor:
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def published_lpips(a: Tensor, b: Tensor, vgg: dict[str, Tensor], heads: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(len(a))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pair = [(x - shift[:, None, None]) / scale[:, None, None] for x in (a, b)]
    head = 0
    for layer in VGG_CHANNELS:
        if layer in (5, 10, 17, 24):
            pair = [F.max_pool2d(x, 2, 2) for x in pair]
        w, bias = vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"]
        pair = [F.relu(F.conv2d(x, w, bias, padding=1)) for x in pair]
        if layer in (2, 7, 14, 21, 28):
            fa, fb = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in pair)
            total += F.conv2d((fa - fb) ** 2, heads[f"lin{head}.model.1.weight"]).mean((1, 2, 3))
            head += 1
    return total


def test_lpips_is_the_published_formula(lpips: LPIPS, lpips_files: tuple[Path, Path]) -> None:
    from safetensors.torch import load_file

    a, b = images(0), images(1)
    expected = published_lpips(a, b, load_file(lpips_files[0]), torch.load(lpips_files[1]))
    torch.testing.assert_close(lpips(a, b), expected)
    assert torch.equal(lpips(a, a), torch.zeros(2))


def test_lpips_refuses_other_files(lpips_files: tuple[Path, Path], tmp_path: Path) -> None:
    weights, heads = lpips_files
    with pytest.raises(ValueError, match=r"has sha256 .*expected 397923af"):
        LPIPS(weights, heads)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="linear heads"):
        LPIPS(weights, heads, weights_sha256=digest)
    with pytest.raises(FileNotFoundError, match="VGG16 in torchvision's layout"):
        LPIPS(tmp_path / "absent.pth", heads)
    with pytest.raises(ValueError, match="does not hold the expected keys"):
        LPIPS(heads, heads, weights_sha256=None)


@pytest.mark.parametrize("name", ["lpips", "distance"])
def test_distances_are_frozen_but_pass_gradients_to_images(name: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue(name)
    torch.nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    a = images(0).requires_grad_(True)
    network(a, images(1)).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().sum() > 0


def test_gradient_is_finite_at_equal_and_flat_images(distance: EfficientNetLite0Distance) -> None:
    for start in (images(0), torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), -1.0)):
        a = start.clone().requires_grad_(True)
        distance(a, start).sum().backward()
        assert a.grad is not None and a.grad.isfinite().all()


def blurred(x: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, (width // 2,) * 4, mode="reflect"), width, 1)


def test_distance_grows_with_damage_and_each_image_counts_alone(distance: EfficientNetLite0Distance) -> None:
    x = images(0) + 0.3 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    damage = [distance(x, blurred(x, width)) for width in (1, 3, 5, 7)]
    assert torch.equal(damage[0], torch.zeros(2))
    assert all((later > earlier).all() for earlier, later in pairwise(damage))
    assert (distance(x, images(1)) > damage[1]).all()
    torch.testing.assert_close(distance(x[1:], images(1)[1:]), distance(x, images(1))[1:])


def drawn(what: str) -> Tensor:
    """A clock or a traffic light, drawn: [3, 224, 224] in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    if what == "clock":
        image, radius = torch.full((3, 224, 224), 0.9), (x - 112).hypot(y - 112)
        image[:, radius < 100] = 1
        image[:, (radius < 100) & (radius > 92)] = 0
        for hour in range(12):
            angle = hour * math.pi / 6
            image[:, (x - 112 - 80 * math.sin(angle)).hypot(y - 112 + 80 * math.cos(angle)) < 5.5] = 0
        image[:, ((x - 112).abs() < 3) & (y > 50) & (y < 112)] = 0
        image[:, ((y - 112).abs() < 3) & (x > 112) & (x < 155)] = 0
    else:
        image = torch.tensor([0.5, 0.7, 0.95]).view(3, 1, 1).repeat(1, 224, 224)
        image[:, ((x - 112).abs() < 38) & ((y - 112).abs() < 95)] = 0.08
        for row, colour in ((50, (1.0, 0.1, 0.1)), (112, (1.0, 0.8, 0.1)), (174, (0.1, 0.9, 0.3))):
            image[:, (x - 112).hypot(y - row) < 26] = torch.tensor(colour)[:, None]
    return image * 2 - 1


def test_the_installed_weights_know_a_clock_from_a_traffic_light() -> None:
    network = load_efficientnet_lite0()
    logits = network(torch.stack([drawn("clock"), drawn("traffic light")]))
    assert logits.argmax(1).tolist() == [409, 920]  # ImageNet's analog clock and traffic light


def test_missing_and_wrong_efficientnet_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EfficientNetLite0Distance(tmp_path / "absent.pth")
    torch.save({"_fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected 579344248a93e230"):
        EfficientNetLite0Distance(tmp_path / "other.pth")
