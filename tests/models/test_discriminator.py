"""The patch discriminator: published initialisation, and a norm that does not mix the images of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldmscale.models.discriminator import PatchDiscriminator


def test_weights_start_as_published() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(layer.weight.detach().mean())) < 2e-3
        if isinstance(layer, nn.BatchNorm2d):
            assert float(layer.weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.4)
            assert not layer.bias.detach().any()


def test_layers_stand_at_the_published_places() -> None:
    names = [type(layer).__mro__[1].__name__ for layer in PatchDiscriminator(layers=2).main]
    assert names == [
        "Conv2d",
        "Module",
        "Conv2d",
        "BatchNorm2d",
        "Module",
        "Conv2d",
        "BatchNorm2d",
        "Module",
        "Conv2d",
    ]


@pytest.mark.parametrize(("norm", "mixes"), [("batch", True), ("group", False)])
def test_only_batch_norm_makes_logits_depend_on_the_other_images(norm: str, mixes: bool) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=32, norm=norm)  # type: ignore[arg-type]
    images = torch.randn(4, 3, 64, 64)
    alone = network(images[:2])
    among_others = network(images)[:2]
    assert torch.allclose(alone, among_others, atol=1e-5) is not mixes


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="expected batch or group"):
        PatchDiscriminator(norm="layer")  # type: ignore[arg-type]
