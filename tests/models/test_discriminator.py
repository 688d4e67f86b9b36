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
        "LeakyReLU",
        "Conv2d",
        "BatchNorm2d",
        "LeakyReLU",
        "Conv2d",
        "BatchNorm2d",
        "LeakyReLU",
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


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_derivative_along_a_direction_carries_the_gradient_penalty_of_double_backward(norm: str) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=32, layers=2, norm=norm).double()  # type: ignore[arg-type]
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    logits = network(images)
    (slope,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), images, create_graph=True)
    penalty = slope.square().sum((1, 2, 3)).mean() / 2
    expected = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)
    again, along = network(images.detach(), slope.detach())
    assert torch.equal(again, logits)
    torch.testing.assert_close(along.mean() / 2, penalty)
    found = torch.autograd.grad(along.mean(), list(network.parameters()), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if other is None or not other.any():
            assert one is None or float(one.abs().max()) < 1e-12
        else:
            assert one is not None
            torch.testing.assert_close(one, other)
