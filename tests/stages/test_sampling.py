"""`sample` on a small model of random weights: what it starts from, what it keeps, what it moves away from."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor

from ldmscale import Parts, build, sample
from ldmscale.data.tokenizers.bert import Tokenizer, train_wordpiece
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.sample_latents import SamplerOptions, follow, starting_noise
from ldmscale.diffusion.timesteps import path_of
from ldmscale.errors import ConfigError
from ldmscale.inference.sample import conditions_of
from ldmscale.models.first_stage import LatentScale

PROMPTS = ["red circle", "blue square", "green triangle"]


def model(folder, *overrides: str) -> Parts:
    torch.manual_seed(0)
    parts = build("smoke", ["train.precision=fp32", *overrides], device="cpu")
    for name, weight in parts.denoiser.named_parameters():
        if "conv_out" in name or "proj_out" in name or "conv2" in name:  # published networks begin with zeros
            torch.nn.init.normal_(weight, std=0.05)
    train_wordpiece(PROMPTS, 200, folder)
    parts.tokenizer = Tokenizer.load(folder, 16)
    parts.denoiser.null_token_ids.copy_(torch.from_numpy(parts.tokenizer.encode([""])[0]))
    parts.scale = LatentScale(torch.full((4,), 0.1), torch.full((4,), 0.8))
    parts.latent_shape = (4, 8, 8)
    for part in (parts.denoiser, parts.autoencoder):
        part.requires_grad_(False).eval()
    return parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def told_twice(tmp_path_factory) -> Parts:
    """Reads a caption and a small image."""
    both = ["spatial=superres", "unet.in_channels=7", "diffusion.spatial_dropout=0.1"]
    return model(tmp_path_factory.mktemp("tokenizer"), *both)


def picture(count: int = 1, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(one: Tensor, other: Tensor, bound: float = 1e-4) -> bool:
    return float((one - other).abs().max()) < bound


@pytest.mark.parametrize(
    "how",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7},
        {"sampler": "ddpm"},
        {"sampler": "plms"},
        {"sampler": "dpmpp_2m"},
        {"sampler": "euler"},
        {"sampler": "ddim", "spacing": "trailing", "guidance_rescale": 0.7},
    ],
    ids=str,
)
def test_an_image_belongs_to_its_prompt_and_seed_and_not_to_its_batch(parts, how):
    together = sample(parts, PROMPTS, steps=4, guidance=2.0, seeds=[5, 6, 7], **how)
    apart = sample(parts, PROMPTS[2:], steps=4, guidance=2.0, seeds=[7], **how)
    assert close(together[2:], apart, 2e-5)
    assert not close(together[:1], together[1:2], 0.01)
    again = sample(parts, PROMPTS[2:], steps=4, guidance=2.0, seeds=[7], **how)
    assert torch.equal(apart, again)


def test_every_sampler_setting_reaches_the_image(parts):
    def draw(**how) -> Tensor:
        return sample(parts, PROMPTS[:1], steps=5, **how)

    plain = draw()
    for how in (
        {"sampler": "ddpm"},
        {"sampler": "plms"},
        {"sampler": "dpmpp_2m"},
        {"sampler": "euler"},
        {"eta": 0.5},
        {"spacing": "trailing"},
        {"guidance": 2.0},
        {"guidance_rescale": 0.7},
        {"negative_prompts": "blue"},
        {"seeds": [1]},
    ):
        assert not close(plain, draw(**how), 1e-4), how


def test_a_negative_prompt_takes_the_place_of_the_null_condition(parts):
    plain = sample(parts, PROMPTS, steps=4, guidance=3.0)
    assert torch.equal(plain, sample(parts, PROMPTS, steps=4, guidance=3.0, negative_prompts=""))
    # Away from the prompt itself nothing is left to follow but the prompt.
    alone = sample(parts, PROMPTS, steps=4, guidance=1.0)
    assert close(alone, sample(parts, PROMPTS, steps=4, guidance=3.0, negative_prompts=PROMPTS))
    one = sample(parts, PROMPTS, steps=4, guidance=3.0, negative_prompts=["", "blue", ""])
    assert close(one[[0, 2]], plain[[0, 2]]) and not close(one[1], plain[1], 1e-3)


def test_an_empty_negative_prompt_beside_others_is_a_learned_null_condition(tmp_path):
    parts = model(tmp_path, "diffusion.null_condition=learned")
    plain = sample(parts, PROMPTS, steps=3, guidance=3.0)
    mixed = sample(parts, PROMPTS, steps=3, guidance=3.0, negative_prompts=["", "blue", ""])
    assert close(mixed[[0, 2]], plain[[0, 2]]) and not close(mixed[1], plain[1], 1e-3)


def compared_with_diffusers(parts: Parts, image: Tensor, steps: int, kept_steps: int, mask: Tensor | None):
    """Latents by a DDIMScheduler, noised and blended as the image-to-image and inpainting pipelines of diffusers do."""
    theirs = diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps[steps - kept_steps :]
    context = parts.denoiser.text_encoder(torch.from_numpy(parts.tokenizer.encode(PROMPTS[:1])))
    latent = parts.scale.scale(parts.autoencoder.encode(image).mean)
    noise = starting_noise([0], latent.shape[1:])
    x = theirs.add_noise(latent, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        x = theirs.step(parts.denoiser.denoise(x, t[None], context), t, x).prev_sample
        if mask is not None and i + 1 < len(timesteps):
            x = mask * x + (1 - mask) * theirs.add_noise(latent, noise, timesteps[i + 1 : i + 2])
    return parts.autoencoder.decode(parts.scale.unscale(x)).clamp(-1, 1)


@pytest.mark.parametrize(("strength", "kept"), [(0.3, 3), (0.75, 7), (None, 7), (1.0, 10)])
def test_image_to_image_is_that_of_diffusers(parts, strength, kept):
    wanted = compared_with_diffusers(parts, picture(), 10, kept, None)
    found = sample(parts, PROMPTS[:1], steps=10, guidance=1.0, image=picture(), strength=strength)
    assert close(found, wanted)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_euler_begins_with_noise_as_large_as_diffusers_begins(parts, spacing):
    theirs = diffusers.EulerDiscreteScheduler(
        1000, 0.00085, 0.012, "scaled_linear", timestep_spacing=spacing, steps_offset=1
    )
    theirs.set_timesteps(5)
    context = parts.denoiser.text_encoder(torch.from_numpy(parts.tokenizer.encode(PROMPTS[:1])))
    noise = starting_noise([0], (4, 8, 8))
    x = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        told = t[None].to(torch.float32 if spacing == "linspace" else torch.int64)
        x = theirs.step(
            parts.denoiser.denoise(theirs.scale_model_input(x, t), told, context), t, x
        ).prev_sample
    wanted = parts.autoencoder.decode(parts.scale.unscale(x)).clamp(-1, 1)
    options = {"steps": 5, "guidance": 1.0, "sampler": "euler", "spacing": spacing}
    assert close(sample(parts, PROMPTS[:1], noise=noise, **options), wanted)


def test_more_strength_leaves_less_of_the_image(parts):
    image = picture()
    kept = parts.autoencoder.decode(parts.autoencoder.encode(image).mean).clamp(-1, 1)
    far = [
        float((sample(parts, PROMPTS[:1], steps=50, image=image, strength=s) - kept).abs().mean())
        for s in (0.02, 0.2, 0.6)
    ]
    assert far[0] < far[1] < far[2] and far[0] < 0.4 * far[2]


def test_inpainting_is_blending_at_every_noise_level(parts):
    """The redrawn part beside a DDIMScheduler with the blending of diffusers' legacy inpainting; the rest as it was."""
    image, mask = picture(), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:24, 16:] = 1
    redraw = mask[:, :, ::4, ::4]
    wanted = compared_with_diffusers(parts, image, 10, 6, redraw)
    found = sample(parts, PROMPTS[:1], steps=10, guidance=1.0, image=image, mask=mask, strength=0.6)
    hole = mask.bool().expand_as(image)
    assert torch.equal(found[~hole], image[~hole])
    # The kept part ends at alpha_bar_0 here and is blended no more there; its noise of 0.03 reaches the decoder's edge.
    inner = torch.zeros_like(hole)
    inner[:, :, 14:18, 22:26] = True
    assert float((found - wanted)[inner].abs().max()) < 0.05
    assert not close(found[hole], image[hole], 0.1)


def test_what_is_redrawn_whole_does_not_see_what_was_there(parts):
    mask = torch.ones(1, 1, 32, 32)
    found = sample(parts, PROMPTS, steps=4, image=picture(), mask=mask)
    assert close(found, sample(parts, PROMPTS, steps=4))


def test_a_pixel_of_the_hole_redraws_its_whole_position_of_the_latent(parts):
    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 13, 13] = 1
    found = sample(parts, PROMPTS[:1], steps=4, image=picture(), mask=mask)
    changed = (found != picture()).any(1)[0].nonzero()
    assert changed.tolist() == [[13, 13]]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "dpmpp_2m", "euler"])
def test_every_sampler_inpaints_and_draws_other_sizes(parts, sampler):
    found = sample(parts, PROMPTS[:2], steps=3, sampler=sampler, height=48, width=64)
    assert found.shape == (2, 3, 48, 64) and torch.isfinite(found).all()
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., 32:] = 1
    found = sample(parts, PROMPTS[:2], steps=3, sampler=sampler, image=picture(1, 48, 64), mask=mask)
    assert torch.equal(found[..., :32], picture(1, 48, 64).expand(2, -1, -1, -1)[..., :32])
    assert not close(found[0, ..., 32:], found[1, ..., 32:], 1e-3)


def test_a_model_trained_without_terminal_signal_is_drawn_from_its_last_timestep(parts):
    asked = []
    unet = parts.denoiser.unet
    handle = unet.register_forward_pre_hook(lambda _, inputs: asked.append(int(inputs[1][0])))
    schedule, prediction = parts.schedule, parts.prediction
    try:
        parts.schedule = NoiseSchedule.make("scaled_linear", 1000, 0.00085, 0.012, True)
        parts.prediction = "v"
        for sampler in ("ddim", "ddpm", "dpmpp_2m", "euler"):
            assert torch.isfinite(sample(parts, PROMPTS[:1], steps=4, sampler=sampler)).all()
        assert asked == [999, 749, 499, 249] * 4
        with pytest.raises(ConfigError, match="noise alone"):
            sample(parts, PROMPTS[:1], steps=4, sampler="plms")
    finally:
        handle.remove()
        parts.schedule, parts.prediction = schedule, prediction


@pytest.mark.parametrize(("spatial_guidance", "guidance"), [(1.5, 5.0), (2.0, 1.0), (3.0, 3.0), (1.0, 4.0)])
def test_caption_and_small_image_are_guided_each_by_its_own_scale(told_twice, spatial_guidance, guidance):
    small = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    conditions = conditions_of(told_twice, PROMPTS, small)
    found = sample(
        told_twice,
        PROMPTS,
        steps=4,
        guidance=guidance,
        spatial_guidance=spatial_guidance,
        conditions=conditions,
    )
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        """Equation 3 of InstructPix2Pix, word for word, with three calls of the whole network."""
        nothing, image, both = (
            told_twice.denoiser(x, t, conditions, drop=drop, drop_spatial=drop_spatial)
            for drop, drop_spatial in ((yes, yes), (yes, no), (no, no))
        )
        return nothing + spatial_guidance * (image - nothing) + guidance * (both - image)

    path = path_of("ddim", told_twice.schedule, 4)
    latents = follow(denoise, starting_noise([0, 1, 2], (4, 8, 8)), path, SamplerOptions(), lambda _: None)
    expected = told_twice.autoencoder.decode(told_twice.scale.unscale(latents)).clamp(-1, 1)
    assert close(found, expected)
    plain = sample(told_twice, PROMPTS, steps=4, guidance=1.0, conditions=conditions)
    assert not close(found, plain, 1e-3)


def test_guidance_on_a_condition_that_was_never_dropped_is_refused(parts, told_twice):
    with pytest.raises(ConfigError, match="nothing is joined to the latent"):
        sample(parts, PROMPTS, spatial_guidance=2.0)
    always = replace(told_twice, spatial_dropout=0.0)
    with pytest.raises(ConfigError, match="always saw what is joined"):
        sample(
            always,
            PROMPTS,
            spatial_guidance=2.0,
            conditions=conditions_of(always, PROMPTS, torch.zeros(3, 3, 8, 8)),
        )


def test_guidance_away_from_a_null_condition_that_was_never_trained_is_said_once(parts, caplog):
    def said(**how) -> int:
        caplog.clear()
        sample(how.pop("parts", never), PROMPTS[:2], steps=1, **how)
        return caplog.text.count("caption_dropout=0")

    never = replace(parts, caption_dropout=0.0)
    assert said(guidance=1.0) == 0 and said(guidance=2.5, negative_prompts="blue") == 0
    assert said(guidance=2.5, parts=replace(parts, caption_dropout=None)) == 0  # another format does not say
    assert said(guidance=2.5, parts=replace(parts, caption_dropout=0.1)) == 0
    assert said(guidance=2.5, negative_prompts=["blue", ""]) == 1 and said(guidance=2.5) == 0


def test_one_prompt_is_one_image_and_what_is_given_must_be_as_many(parts):
    assert torch.equal(sample(parts, PROMPTS[0], steps=1), sample(parts, PROMPTS[:1], steps=1))
    with pytest.raises(ConfigError, match="prompts is empty"):
        sample(parts, [])
    with pytest.raises(ConfigError) as error:
        told = conditions_of(parts, PROMPTS[:1])
        sample(parts, PROMPTS, steps=1, noise=torch.zeros(3, 4, 8, 9), conditions=told)
    assert "expected (3, 4, 8, 8)" in error.value.faults[0] and "not of 3 samples" in error.value.faults[1]


def test_what_a_model_lacks_is_named_with_its_remedy(parts):
    with pytest.raises(ConfigError) as error:
        sample(replace(parts, tokenizer=None, denoiser=None, scale=None), PROMPTS)
    told = error.value.faults
    assert len(told) == 2 and "scale_factor=N" in told[0] and "tokenizer=NAME_OR_FOLDER" in told[1]


def test_all_that_does_not_fit_is_told_at_once(parts):
    with pytest.raises(ConfigError) as error:
        sample(
            parts,
            PROMPTS,
            steps=1000,
            seeds=[1],
            sampler="plms",
            eta=0.5,
            height=33,
            mask=torch.ones(1, 1, 32, 32),
            negative_prompts=["a"],
        )
    told = "\n".join(error.value.faults)
    for part in (
        "expected 1 to 999",
        "seeds has 1 entries for 3 prompts",
        "eta=0.5 is a setting of ddim",
        "give height=32",
        "a mask was given without an image",
        "negative_prompts has 1 entries",
    ):
        assert part in told, told
    with pytest.raises(ConfigError, match="expected ddpm, ddim"):
        sample(parts, PROMPTS, sampler="heun")
    with pytest.raises(ConfigError, match=r"strength 0.01 of 10 steps"):
        sample(parts, PROMPTS, steps=10, image=picture(), strength=0.01)
    with pytest.raises(ConfigError, match=r"image has the shape \(2, 3, 32, 32\)"):
        sample(parts, PROMPTS, image=picture(2))
