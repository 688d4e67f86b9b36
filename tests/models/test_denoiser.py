"""Each condition reaches the U-Net, the null condition replaces exactly the dropped ones, one forward trains all."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from parity import draw, randomise

from ldmscale.models.conditions import ClassEmbedder, Conditions, GivenContext, SpatialRescaler
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet

NULL = torch.tensor([1, 2, 0, 0, 0])
IDS = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])
CAPTIONS = Conditions(token_ids=IDS)
FIRST, LAST = torch.tensor([True, False]), torch.tensor([False, True])


def unet(context_dim: int | None = 16, joined: int = 0) -> UNet:
    return UNet(
        in_channels=4 + joined,
        out_channels=4,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_levels=(1,),
        heads=2,
        context_dim=context_dim,
    )


def denoiser(null_condition: Literal["tokens", "learned"] = "tokens") -> Denoiser:
    text = TextTransformer(vocab_size=9, max_tokens=5, width=16, layers=1, heads=2, head_channels=8)
    network = Denoiser(unet(), text, NULL, null_condition=null_condition)
    randomise(network)
    return network


def context_of(network: Denoiser, conditions: Conditions, drop: torch.Tensor | None = None) -> torch.Tensor:
    context = network.encode(conditions, drop).context
    assert context is not None
    return context


def test_dropped_captions_become_the_empty_caption() -> None:
    network = denoiser()
    found = context_of(network, CAPTIONS, FIRST)
    assert torch.equal(found, context_of(network, Conditions(token_ids=torch.stack([NULL, IDS[1]]))))


def test_dropped_captions_become_the_learned_context_and_train_it() -> None:
    network = denoiser("learned")
    kept = context_of(network, CAPTIONS, torch.tensor([False, False]))
    found = context_of(network, CAPTIONS, FIRST)
    assert network.null_context is not None
    assert torch.equal(found[0], network.null_context.weight)
    assert torch.equal(found[1], kept[1])
    found.sum().backward()
    assert torch.equal(network.null_context.weight.grad, torch.ones(5, 16))


def test_dropped_labels_become_the_class_behind_the_others() -> None:
    network = Denoiser(unet(), class_embedder=ClassEmbedder(classes=9, width=16))
    randomise(network)
    found = context_of(network, Conditions(labels=torch.tensor([3, 8])), LAST)
    assert network.class_embedder is not None and found.shape == (2, 1, 16)
    assert torch.equal(found[:, 0], network.class_embedder.embedding.weight[[3, 9]])


def test_labels_without_a_null_class_cannot_be_dropped_unless_the_null_is_learned() -> None:
    labels = Conditions(labels=torch.tensor([3, 8]))
    bare = Denoiser(unet(), class_embedder=ClassEmbedder(classes=9, width=16, null_class=False))
    assert not bare.has_null
    assert context_of(bare, labels).shape == (2, 1, 16)
    with pytest.raises(ValueError, match="no null condition"):
        bare.encode(labels, FIRST)
    embedder = ClassEmbedder(classes=9, width=16, null_class=False)
    learned = Denoiser(unet(), class_embedder=embedder, null_condition="learned")
    assert learned.has_null and learned.null_context is not None
    assert torch.equal(context_of(learned, labels, FIRST)[0], learned.null_context.weight)


def test_embeddings_pass_as_they_are_and_become_zeros_where_dropped() -> None:
    network = Denoiser(unet(), embeddings=GivenContext(max_tokens=4, width=16))
    given = draw(2, 3, 16).float()
    found = context_of(network, Conditions(embeddings=given), FIRST)
    assert torch.equal(found[1], given[1]) and not found[0].any()
    with pytest.raises(ValueError, match="at most 4"):
        network.encode(Conditions(embeddings=draw(2, 5, 16)))


def test_captions_and_joined_channels_work_together() -> None:
    text = TextTransformer(vocab_size=9, max_tokens=5, width=16, layers=1, heads=2, head_channels=8)
    network = Denoiser(unet(joined=3), text, NULL)
    randomise(network)
    x, t, small = draw(2, 4, 8, 8).float(), torch.tensor([3, 700]), draw(2, 3, 8, 8, seed=3).float()
    conditions = Conditions(token_ids=IDS, spatial=small)
    expected = network.unet(x, t, text(IDS), small)
    assert torch.equal(network(x, t, conditions), expected)
    dropped = network(x, t, conditions, FIRST, drop_spatial=LAST)
    part_null, part_blank = torch.stack([NULL, IDS[1]]), torch.stack([small[0], torch.zeros_like(small[1])])
    assert torch.equal(dropped, network.unet(x, t, text(part_null), part_blank))
    assert ((dropped - expected).abs().amax((1, 2, 3)) > 1e-3).all()  # both conditions are read


def reference_rescaler(one_hot: torch.Tensor, weight: torch.Tensor, halvings: int) -> torch.Tensor:
    """The released order: bilinear interpolation by one half, several times, then a 1x1 convolution."""
    for _ in range(halvings):
        one_hot = F.interpolate(one_hot, scale_factor=0.5, mode="bilinear")
    return torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], one_hot)


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_the_spatial_rescaler_maps_class_numbers_as_it_maps_their_one_hot_map(halvings: int) -> None:
    rescaler = SpatialRescaler(in_channels=7, out_channels=3, halvings=halvings).double()
    randomise(rescaler)
    numbers = torch.randint(0, 7, (2, 16, 8), generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(numbers, 7).permute(0, 3, 1, 2).double()
    weight = rescaler.channel_mapper.weight
    expected = reference_rescaler(one_hot, weight, halvings)
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    for given in (numbers, one_hot):
        found = rescaler(given)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), weight), (wanted,), rtol=1e-10, atol=1e-10
        )


def test_one_forward_gives_gradients_to_all_readers() -> None:
    x, t = draw(2, 4, 8, 8).float(), torch.tensor([3, 700])
    network = denoiser()
    prediction = network(x, t, CAPTIONS, LAST)
    assert torch.equal(prediction, network.denoise(x, t, network.encode(CAPTIONS, LAST).context))
    prediction.square().mean().backward()
    # Row 3 of the token table belongs to no caption here; every parameter as a whole must be reached.
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    mapped = Denoiser(
        unet(joined=3),
        class_embedder=ClassEmbedder(classes=2, width=16),
        spatial_rescaler=SpatialRescaler(in_channels=7, out_channels=3, halvings=1),
    )
    randomise(mapped)
    classes = torch.randint(0, 7, (2, 16, 16), generator=torch.Generator().manual_seed(2))
    mapped(x, t, Conditions(labels=torch.tensor([0, 1]), spatial=classes)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in mapped.parameters())


def test_a_unet_alone_is_unconditional() -> None:
    network = Denoiser(unet(None))
    randomise(network)
    x, t = draw(2, 4, 8, 8).float(), torch.tensor([3, 700])
    assert not network.has_null
    assert network.encode(Conditions()) == (None, None)
    assert torch.equal(network(x, t), network.unet(x, t))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (Conditions(), "reads token_ids and was called without them"),
        (Conditions(token_ids=IDS, labels=torch.tensor([1, 2])), "reads no labels and was called with them"),
        (Conditions(token_ids=IDS, spatial=torch.zeros(2, 3, 8, 8)), "reads no spatial"),
    ],
)
def test_conditions_that_are_missing_or_not_read_are_refused(conditions: Conditions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser().encode(conditions)


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
        Denoiser(unet(), text, null)


def test_a_unet_that_reads_a_context_needs_a_text_encoder() -> None:
    with pytest.raises(ValueError, match="there is no text encoder"):
        Denoiser(unet(16))


def test_two_readers_of_one_context_are_refused() -> None:
    embedder, given = ClassEmbedder(classes=2, width=16), GivenContext(max_tokens=4, width=16)
    with pytest.raises(ValueError, match="class embedder and embeddings would both give the context"):
        Denoiser(unet(), class_embedder=embedder, embeddings=given)


def test_a_rescaler_that_does_not_fill_the_unet_is_refused() -> None:
    rescaler = SpatialRescaler(in_channels=7, out_channels=3, halvings=1)
    with pytest.raises(ValueError, match="room for 2 joined channels, the spatial rescaler gives 3"):
        Denoiser(unet(None, joined=2), spatial_rescaler=rescaler)
