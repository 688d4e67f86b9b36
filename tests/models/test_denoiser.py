"""The null condition replaces exactly the dropped captions, and one forward trains both networks."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from parity import randomise

from ldmscale.models.denoiser import TextConditionedDenoiser
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

NULL = torch.tensor([1, 2, 0, 0, 0])
CAPTIONS = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])


def unet(context_dim: int | None = 16) -> UNet:
    return UNet(
        in_channels=4,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_levels=(1,),
        heads=2,
        context_dim=context_dim,
    )


def denoiser(null_condition: Literal["tokens", "learned"] = "tokens") -> TextConditionedDenoiser:
    text = TextTransformer(vocab_size=9, max_tokens=5, width=16, layers=1, heads=2, head_channels=8)
    network = TextConditionedDenoiser(unet(), text, NULL, null_condition=null_condition)
    randomise(network)
    return network


def test_dropped_captions_become_the_empty_caption() -> None:
    network = denoiser()
    found = network.context(CAPTIONS, torch.tensor([True, False]))
    expected = network.context(torch.stack([NULL, CAPTIONS[1]]))
    assert found is not None and expected is not None
    assert torch.equal(found, expected)


def test_dropped_captions_become_the_learned_context_and_train_it() -> None:
    network = denoiser("learned")
    kept = network.context(CAPTIONS, torch.tensor([False, False]))
    found = network.context(CAPTIONS, torch.tensor([True, False]))
    assert network.null_context is not None and kept is not None and found is not None
    assert torch.equal(found[0], network.null_context.weight)
    assert torch.equal(found[1], kept[1])
    found.sum().backward()
    assert torch.equal(network.null_context.weight.grad, torch.ones(5, 16))


def test_one_forward_gives_gradients_to_both_networks() -> None:
    network = denoiser()
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    drop = torch.tensor([False, True])
    prediction = network(x, t, CAPTIONS, drop)
    assert torch.equal(prediction, network.denoise(x, t, network.context(CAPTIONS, drop)))
    prediction.square().mean().backward()
    # Row 3 of the token table belongs to no caption here; every parameter as a whole must be reached.
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_a_unet_alone_is_unconditional() -> None:
    network = TextConditionedDenoiser(unet(None))
    randomise(network)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    assert network.context(None) is None
    assert torch.equal(network(x, t), network.unet(x, t))


def test_the_empty_caption_is_saved_with_the_weights() -> None:
    assert torch.equal(denoiser().state_dict()["null_token_ids"], NULL)


@pytest.mark.parametrize(
    ("text_width", "null", "message"),
    [
        (32, NULL, "context_dim 16 and the text encoder width 32"),
        (16, None, "needs null_token_ids"),
        (16, NULL.float(), r"expected int64 \[L\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(text_width: int, null: torch.Tensor | None, message: str) -> None:
    text = TextTransformer(vocab_size=9, max_tokens=5, width=text_width, layers=1, heads=2, head_channels=8)
    with pytest.raises(ValueError, match=message):
        TextConditionedDenoiser(unet(), text, null)


def test_a_unet_that_reads_a_context_needs_a_text_encoder() -> None:
    with pytest.raises(ValueError, match="there is no text encoder"):
        TextConditionedDenoiser(unet(16))
