"""The network of the Frechet inception distance: size, key names, and its features, written out a second time.

The first implementation was also compared with the network of PyPI's pytorch-fid 0.3.0 (which needs torchvision, and so
cannot be here) at random weights: features up to 32 agree within 5e-6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.builders.feature_networks import open_features
from ldmscale.errors import ConfigError
from ldmscale.models.inception import Inception
from ldmscale.storage.digest import file_sha256

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random values under the names of the published file, its classifier among them."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, value in Inception().state_dict().items():
        if name.endswith("conv.weight"):
            found[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            found[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif not name.endswith("num_batches_tracked"):  # which files of that age do not hold
            found[name] = torch.randn(value.shape, generator=generator) * 0.1
    return found | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(weights, path)
    return path


def written_out(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """float64 [B,3,299,299] in [-1,1] -> [B,2048], line by line after the released graph."""

    def conv(x: Tensor, name: str, stride: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
        w = {key: weights[f"{name}.{key}"].double() for key in ("conv.weight", "bn.weight", "bn.bias")}
        mean, variance = (weights[f"{name}.bn.running_{key}"].double() for key in ("mean", "var"))
        x = F.conv2d(x, w["conv.weight"], stride=stride, padding=pad)
        scale = w["bn.weight"] / (variance + 0.001).sqrt()
        return ((x - mean[:, None, None]) * scale[:, None, None] + w["bn.bias"][:, None, None]).clamp(min=0)

    def mean_within(x: Tensor) -> Tensor:
        inside = F.avg_pool2d(F.pad(torch.ones_like(x), (1, 1, 1, 1)), 3, 1)
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) / inside

    def reach(x: Tensor, block: str, *steps: tuple[str, int, tuple[int, int]]) -> Tensor:
        for name, stride, pad in steps:
            x = conv(x, f"{block}.{name}", stride, pad)
        return x

    none, line, column, around = (0, 0), (0, 3), (3, 0), (1, 1)
    x = conv(images, "Conv2d_1a_3x3", 2)
    x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, around)
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        one = reach(x, b, ("branch1x1", 1, none))
        five = reach(x, b, ("branch5x5_1", 1, none), ("branch5x5_2", 1, (2, 2)))
        twice = ("branch3x3dbl_1", 1, none), ("branch3x3dbl_2", 1, around), ("branch3x3dbl_3", 1, around)
        pool = reach(mean_within(x), b, ("branch_pool", 1, none))
        x = torch.cat([one, five, reach(x, b, *twice), pool], 1)
    assert x.shape[1:] == (288, 35, 35)
    b = "Mixed_6a"
    twice = ("branch3x3dbl_1", 1, none), ("branch3x3dbl_2", 1, around), ("branch3x3dbl_3", 2, none)
    x = torch.cat([conv(x, f"{b}.branch3x3", 2), reach(x, b, *twice), F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = ("branch7x7_1", 1, none), ("branch7x7_2", 1, line), ("branch7x7_3", 1, column)
        double = zip((none, column, line, column, line), range(1, 6), strict=True)
        chain = [(f"branch7x7dbl_{number}", 1, pad) for pad, number in double]
        one, pool = conv(x, f"{b}.branch1x1"), conv(mean_within(x), f"{b}.branch_pool")
        x = torch.cat([one, reach(x, b, *seven), reach(x, b, *chain), pool], 1)
    assert x.shape[1:] == (768, 17, 17)
    b = "Mixed_7a"
    three = reach(x, b, ("branch3x3_1", 1, none), ("branch3x3_2", 2, none))
    pads = ((1, none), (1, line), (1, column), (2, none))
    chain = [(f"branch7x7x3_{number}", stride, pad) for number, (stride, pad) in enumerate(pads, 1)]
    x = torch.cat([three, reach(x, b, *chain), F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_7b", "Mixed_7c"):
        pooled = mean_within(x) if b == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        first = conv(x, f"{b}.branch3x3_1")
        second = reach(x, b, ("branch3x3dbl_1", 1, none), ("branch3x3dbl_2", 1, around))
        parts = [conv(x, f"{b}.branch1x1")]
        for start, name in ((first, "branch3x3_2"), (second, "branch3x3dbl_3")):
            parts += [conv(start, f"{b}.{name}a", 1, (0, 1)), conv(start, f"{b}.{name}b", 1, (1, 0))]
        x = torch.cat([*parts, conv(pooled, f"{b}.branch_pool")], 1)
    assert x.shape[1:] == (2048, 8, 8)
    return x.mean((2, 3))


def test_it_has_the_size_and_the_names_of_the_published_network(weights: dict[str, Tensor]) -> None:
    assert sum(p.numel() for p in Inception().parameters()) == 21_785_568
    convolutions = [name for name in weights if name.endswith(".conv.weight")]
    assert len(convolutions) == 94
    assert weights["Mixed_6e.branch7x7dbl_2.conv.weight"].shape == (192, 192, 7, 1)
    assert weights["Mixed_7c.branch3x3dbl_3a.conv.weight"].shape == (384, 384, 1, 3)
    assert weights["Mixed_5d.branch_pool.bn.running_mean"].shape == (64,)


def test_its_features_are_those_of_the_released_graph(weights: dict[str, Tensor]) -> None:
    network = Inception().double().eval()
    kept = {name: value.double() for name, value in weights.items() if not name.startswith("fc.")}
    network.load_state_dict(kept)
    images = torch.rand(1, 3, 299, 299, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network.pooled(images * 2 - 1), written_out(images * 2 - 1, weights))


def test_a_distance_is_called_fid_over_the_published_weights_only(
    file: Path, weights: dict[str, Tensor]
) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluate.features=inception_fid: .*expected 6726825d.*pytorch-fid"
    ):
        open_features("inception_fid", str(file), None, CPU, key="evaluate.features")
    with pytest.raises(ConfigError, match="needs the file of its weights"):
        open_features("inception_fid", None, None, CPU, key="evaluate.features")
    features = open_features("inception_fid", str(file), file_sha256(file), CPU, key="evaluate.features")
    assert features is not None
    assert (features.distance, features.width) == ("frechet_distance_inception_fid", 2048)
    # As a saved picture would have them: whole bytes, enlarged without antialiasing.
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(2)) * 2 - 1
    saved = ((images + 1) * 127.5).round() / 255
    large = F.interpolate(saved.double(), size=(299, 299), mode="bilinear", align_corners=False)
    expected = written_out(large * 2 - 1, weights)
    torch.testing.assert_close(features(images).double(), expected, rtol=1e-3, atol=1e-3)
