"""Imported and exported models compute what diffusers computes, by its own classes and its own converters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    LDMTextToImagePipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from families import FAMILIES, bert_words, compvis_state, randomised
from torch import Tensor, nn

from ldmscale import load, sample
from ldmscale.cli import main

LIMIT = 5e-6  # of the largest value, float32


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= LIMIT, error


def filled(network: nn.Module) -> nn.Module:
    network.load_state_dict(randomised(network, 3))
    return network.eval()


def conditional(**changes) -> nn.Module:
    values = dict(
        sample_size=8, in_channels=5, out_channels=3, layers_per_block=1, block_out_channels=(32, 96), cross_attention_dim=20,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=6, transformer_layers_per_block=2,
    )  # fmt: skip
    return UNet2DConditionModel(**(values | changes))


STEPS = torch.tensor([3, 981])
UNETS = {
    "two blocks deep, six heads": conditional(),
    "a width of one and a half": conditional(block_out_channels=(64, 96), in_channels=3),
    "heads by size": conditional(attention_head_dim=(2, 6), down_block_types=("CrossAttnDownBlock2D",) * 2,
                                 up_block_types=("CrossAttnUpBlock2D",) * 2),
    "linear projections": conditional(use_linear_projection=True),
    "few groups, scale and shift": conditional(
        norm_num_groups=8, resnet_time_scale_shift="scale_shift", block_out_channels=(24, 48)),
    "class numbers": conditional(num_class_embeds=7),
    "three levels": conditional(
        block_out_channels=(32, 32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=3, attention_head_dim=4),
    "plain": UNet2DModel(sample_size=8, block_out_channels=(32, 64), down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
                         up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"), attention_head_dim=16, layers_per_block=1),
    "plain, one head": UNet2DModel(sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                   up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None, layers_per_block=1),
    "plain, residual resampling": UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), down_block_types=("ResnetDownsampleBlock2D",) * 2, layers_per_block=1,
        up_block_types=("ResnetUpsampleBlock2D",) * 2, attention_head_dim=16),
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_of_any_shape_gives_diffusers_outputs(name, tmp_path):
    reference = filled(UNETS[name])
    reference.save_pretrained(tmp_path / "there")
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 0
    unet = load(tmp_path / "model").unet
    x = draw(2, reference.config.in_channels, 8, 8)
    labels = torch.tensor([1, 6]) if reference.config.num_class_embeds else None
    with torch.no_grad():
        if isinstance(reference, UNet2DModel):
            assert_close(unet(x, STEPS), reference(x, STEPS).sample)
        else:
            context = draw(2, 7, 20)
            expected = reference(x, STEPS, context, class_labels=labels).sample
            assert_close(unet(x, STEPS, context, labels=labels), expected)
    # And written anew, not as it was stored: from CompVis' names.
    if (
        name != "plain, residual resampling"
        and reference.config.norm_num_groups == 32
        and name != "a width of one and a half"
    ):
        assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/m.ckpt", "format=compvis"]) == 0
        assert main(["export", f"src={tmp_path}/m.ckpt", f"dst={tmp_path}/anew", "format=diffusers"]) == 0
        anew = type(reference).from_pretrained(tmp_path / "anew")
        with torch.no_grad():
            if isinstance(reference, UNet2DModel):
                assert torch.equal(anew(x, STEPS).sample, reference(x, STEPS).sample)
            else:
                again = anew(x, STEPS, context, class_labels=labels).sample
                assert_close(again, expected)


AUTOENCODERS = {
    "kl, attention in a level": AutoencoderKL(
        block_out_channels=(32, 64, 64), down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=6, scaling_factor=0.3),
    "kl, few groups": AutoencoderKL(
        block_out_channels=(16, 24), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8, layers_per_block=2, mid_block_add_attention=False),
    "vq, wide table": VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), vq_embed_dim=2,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=3, num_vq_embeddings=24),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_autoencoder_of_any_shape_gives_diffusers_outputs(name, dtype, tmp_path):
    reference = filled(AUTOENCODERS[name]).to(dtype)
    reference.save_pretrained(tmp_path / "there")
    reference.float()
    ours = load(tmp_path / "there").autoencoder  # the folder itself, without an import
    images = draw(2, 3, 16, 16)
    with torch.no_grad():
        if isinstance(reference, VQModel):
            latent = reference.encode(images).latents
            assert_close(ours.encode(images).latent, latent)
        else:
            latent = reference.encode(images).latent_dist.mean
            assert_close(ours.encode(images).mean, latent)
        assert_close(ours.decode(latent), reference.decode(latent).sample)


def test_a_text_encoder_gives_diffusers_outputs(tmp_path):
    config = LDMBertConfig(
        vocab_size=50, max_position_embeddings=9, encoder_layers=2, d_model=24, encoder_ffn_dim=48, encoder_attention_heads=3,
        head_dim=10,
    )  # fmt: skip
    reference = filled(LDMBertModel(config))
    reference.save_pretrained(tmp_path / "there")
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 0
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(load(tmp_path / "model").text_encoder(ids), reference(ids)[0])


@pytest.mark.parametrize("family", ["text2img", "layout"])
def test_diffusers_own_converters_read_our_names_as_we_do(family, tmp_path):
    state = compvis_state(FAMILIES[family], with_extras=False)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    job = ["export", f"src={tmp_path}/a", f"dst={tmp_path}/there", "format=diffusers"]
    known = ["scale_factor=1", *FAMILIES[family].given]
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/a", *known]) == 0 and main(job) == 0
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "there" / "unet")
    converted = convert_ldm_unet_checkpoint(dict(state), dict(unet.config))
    ours = unet.state_dict()
    assert set(converted) == set(ours) and all(torch.equal(ours[name], t) for name, t in converted.items())
    if family == "text2img":
        first = AutoencoderKL.from_pretrained(tmp_path / "there" / "vqvae")
        converted = convert_ldm_vae_checkpoint(dict(state), dict(first.config))
        ours = first.state_dict()
        assert all(torch.equal(ours[name].flatten(), t.flatten()) for name, t in converted.items())


def test_the_three_projections_of_plain_attention_are_interleaved_by_head(tmp_path):
    """By the published arithmetic: one convolution, split into heads first and into q, k and v then."""
    state = compvis_state(FAMILIES["faces"], with_extras=False)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/a", "unet.head_channels=16"]) == 0
    block = load(tmp_path / "a").unet.mid_block.attentions[0]
    x = draw(2, 96, 4, 4)
    there = {
        key.rpartition("middle_block.1.")[2]: t
        for key, t in state.items()
        if "diffusion_model.middle_block.1." in key
    }
    h = F.group_norm(x, 32, there["norm.weight"], there["norm.bias"], 1e-5).flatten(2)
    heads = F.conv1d(h, there["qkv.weight"], there["qkv.bias"]).reshape(2 * 6, 3 * 16, 16)
    q, k, v = heads.split(16, dim=1)
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q * 16**-0.25, k * 16**-0.25), dim=-1)
    a = torch.einsum("bts,bcs->bct", weight, v).reshape(2, 96, 16)
    expected = x + F.conv1d(a, there["proj_out.weight"], there["proj_out.bias"]).reshape(2, 96, 4, 4)
    assert_close(block(x), expected)


PROMPTS = ["a red dragon", "two tanks on the hill"]


@pytest.mark.parametrize("kind", ["kl_f8", "vq_f4", "v_zero_snr"])
def test_an_exported_pipeline_draws_what_sample_draws(kind, tmp_path):
    family = FAMILIES["text2img_256" if kind == "vq_f4" else "text2img"]
    other = ["diffusion=v_zero_snr"] if kind == "v_zero_snr" else []
    torch.save({"state_dict": compvis_state(family, with_extras=not other)}, tmp_path / "model.ckpt")
    words = bert_words(tmp_path / "words")
    known = [f"tokenizer={words}", "scale_factor=0.7", "latent_size=8", *family.given, *other]
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", *known]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/there", "format=diffusers"]) == 0
    noise = draw(2, family.unet.out_channels, 8, 8, seed=9)
    ours = sample(load(tmp_path / "model"), PROMPTS, steps=5, guidance=3.0, noise=noise)
    pipeline = LDMTextToImagePipeline.from_pretrained(tmp_path / "there")
    pipeline.set_progress_bar_config(disable=True)
    there = pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=3.0, latents=noise.clone(), output_type="np"
    ).images
    expected = torch.from_numpy(np.asarray(there)).permute(0, 3, 1, 2) * 2 - 1
    assert ours.std() > 0.1 and ours.shape[-1] == 8 * family.autoencoder.factor
    assert float((ours - expected).abs().max()) < 1e-4  # five guided steps, each 5e-6 of values up to 30
    # The folder read without an import draws the same, at the same size.
    again = load(tmp_path / "there")
    assert again.latent_shape == (family.unet.out_channels, 8, 8)
    assert torch.equal(sample(again, PROMPTS, steps=5, guidance=3.0, noise=noise), ours)
    # And the pipeline's own size is the trained one.
    alone = pipeline(PROMPTS[:1], num_inference_steps=1, output_type="np").images
    assert alone.shape[1] == ours.shape[-1]


def test_a_pipeline_saved_by_diffusers_draws_the_same_here(tmp_path):
    torch.manual_seed(0)
    unet = filled(conditional(in_channels=4, out_channels=4, cross_attention_dim=24))
    first = filled(AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                                 up_block_types=("UpDecoderBlock2D",) * 4))  # fmt: skip
    from transformers import BertTokenizer

    bert = filled(LDMBertModel(LDMBertConfig(
        vocab_size=40, encoder_layers=1, d_model=24, encoder_ffn_dim=96, encoder_attention_heads=2, head_dim=16)))  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              steps_offset=1, set_alpha_to_one=False)  # fmt: skip
    words = BertTokenizer.from_pretrained(bert_words(tmp_path / "words"))
    pipeline = LDMTextToImagePipeline(first, bert, words, unet, scheduler)
    pipeline.save_pretrained(tmp_path / "there")
    pipeline.set_progress_bar_config(disable=True)
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 0
    noise = draw(2, 4, 8, 8)
    there = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=2.0, latents=noise.clone(), output_type="np"
    ).images
    expected = torch.from_numpy(there).permute(0, 3, 1, 2) * 2 - 1
    ours = sample(load(tmp_path / "model"), PROMPTS, steps=4, guidance=2.0, noise=noise)
    assert float((ours - expected).abs().max()) < 1e-4


def test_an_unconditional_model_runs_in_its_pipeline(tmp_path):
    torch.save({"state_dict": compvis_state(FAMILIES["faces"])}, tmp_path / "model.ckpt")
    known = ["scale_factor=1", "latent_size=8", "unet.head_channels=16"]
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", *known]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/there", "format=diffusers"]) == 0
    pipeline = LDMPipeline.from_pretrained(tmp_path / "there")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    there = pipeline(
        generator=torch.Generator().manual_seed(4), num_inference_steps=3, output_type="np"
    ).images
    ours = sample(load(tmp_path / "model"), [""], steps=3, noise=noise)
    assert float((ours - (torch.from_numpy(there).permute(0, 3, 1, 2) * 2 - 1)).abs().max()) < 1e-4
