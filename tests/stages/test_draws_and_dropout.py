"""Random numbers belong to samples; captions are dropped at the asked rate, for the named null condition."""

import pytest
import torch

from ldmscale.diffusion.process import drop_mask
from ldmscale.diffusion.sample_latents import starting_noise
from ldmscale.distributed import rng as draws
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.layers import has_dropout
from ldmscale.models.text_encoder import TextTransformer
from ldmscale.models.unet import UNet


def test_draws_of_a_sample_do_not_depend_on_its_batch():
    together = draws.normal(7, [3, 4, 5, 6], "noise", (2, 4))
    apart = torch.cat([draws.normal(7, [5], "noise", (2, 4)), draws.normal(7, [3, 6], "noise", (2, 4))])
    assert torch.equal(together[[2, 0, 3]], apart)


def test_draws_differ_by_seed_position_and_purpose():
    base = draws.normal(0, [1], "noise", (64,))
    for other in (
        draws.normal(1, [1], "noise", (64,)),
        draws.normal(0, [2], "noise", (64,)),
        draws.normal(0, [1], "posterior", (64,)),
    ):
        assert (base - other).abs().min() > 0


def test_draws_are_standard_normal_and_uniform():
    normal = draws.normal(0, range(2000), "noise", (50,))
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    uniform = draws.uniform(0, range(20_000), "timestep")
    assert torch.histc(uniform, 10, 0, 1).sub(2000).abs().max() < 200


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_asked_rate(rate):
    dropped = drop_mask(draws.uniform(3, range(20_000), "drop"), rate).float().mean()
    assert float(dropped) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 20_000) ** 0.5)


@pytest.mark.parametrize("null", ["tokens", "learned"])
def test_a_dropped_caption_is_the_named_null_condition(null):
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        channels=32,
        channel_mult=(1,),
        blocks_per_level=1,
        attention_levels=(0,),
        heads=2,
        context_dim=16,
    )
    text = TextTransformer(vocab_size=50, max_tokens=6, width=16, layers=1, heads=2, head_channels=8)
    null_ids = torch.tensor([2, 3, 0, 0, 0, 0])
    network = Denoiser(unet, text, null_ids, null_condition=null)
    for (
        parameter
    ) in unet.parameters():  # published networks have zeros behind attention, which would hide the condition
        torch.nn.init.normal_(parameter, std=0.2)
    captions = Conditions(token_ids=torch.randint(5, 50, (3, 6)))
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([1, 500, 900])
    with torch.no_grad():
        half = network(x, t, captions, torch.tensor([False, True, False]))
        kept, dropped = (
            network(x, t, captions, torch.zeros(3, dtype=torch.bool)),
            network(x, t, captions, torch.ones(3, dtype=torch.bool)),
        )
        expected = text(null_ids[None]) if null == "tokens" else network.null_context()[None]
        assert torch.allclose(
            network.encode(captions, torch.ones(3, dtype=torch.bool)).context,
            expected.expand(3, -1, -1),
            atol=1e-6,
        )
    torch.testing.assert_close(half[[0, 2]], kept[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half[1], dropped[1], atol=1e-5, rtol=1e-5)
    assert (kept - dropped).abs().max() > 1e-3
    name = "null_token_ids" if null == "tokens" else "null_context.weight"
    assert name in network.state_dict()


def test_starting_noise_belongs_to_the_seed():
    together = starting_noise([4, 5, 6], (4, 2, 2))
    assert torch.equal(starting_noise([6], (4, 2, 2))[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_dropout_masks_belong_to_the_position_of_a_micro_batch():
    def mask(seed, position):
        draws.seed_torch(seed, position, "dropout")
        return torch.nn.functional.dropout(torch.ones(1000), 0.5)

    first = mask(0, 4)
    torch.rand(7)  # what was drawn in between has no say
    assert torch.equal(mask(0, 4), first)
    for other in (mask(0, 0), mask(0, 8), mask(1, 4)):  # two ranks' masks agree as often as chance has it
        assert 400 < int((other == first).sum()) < 600


@pytest.mark.parametrize("part", ["unet", "text"])
def test_a_network_that_draws_dropout_masks_is_known_as_one(part):
    def drawing(rate):
        if part == "text":
            return TextTransformer(
                vocab_size=9, max_tokens=3, width=8, layers=1, heads=1, head_channels=8, dropout=rate
            )
        return UNet(in_channels=1, out_channels=1, channels=32, channel_mult=(1,), blocks_per_level=1,
                    attention_levels=(), heads=1, dropout=rate)  # fmt: skip

    assert has_dropout(drawing(0.1)) and not has_dropout(drawing(0.0))
