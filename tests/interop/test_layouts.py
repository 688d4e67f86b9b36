"""The ways in which diffusers lays out weights: shards, pickles, variants, names from before 0.17; and a run's own text encoder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, LDMTextToImagePipeline
from families import FAMILIES, bert_words, compvis_state, randomised
from safetensors.torch import load_file, save_file

from ldmscale import load
from ldmscale.cli import main


def autoencoder() -> AutoencoderKL:
    made = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )  # fmt: skip
    made.load_state_dict(randomised(made, 2))
    return made


def shards(folder: Path) -> None:
    autoencoder().save_pretrained(folder, max_shard_size="500KB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()


def pickled(folder: Path) -> None:
    autoencoder().save_pretrained(folder, safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()


def half_variant(folder: Path) -> None:
    autoencoder().half().save_pretrained(folder, variant="fp16")
    assert (folder / "diffusion_pytorch_model.fp16.safetensors").is_file()


def old_names(folder: Path) -> None:
    autoencoder().save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, old in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(new, old)
        renamed[name] = tensor
    save_file(renamed, file, {"format": "pt"})


@pytest.mark.parametrize("lay", [shards, pickled, half_variant, old_names], ids=lambda f: f.__name__)
def test_every_layout_is_read_and_written_so_that_diffusers_reads_the_same(lay, tmp_path):
    lay(tmp_path / "there")
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/back", "format=diffusers"]) == 0
    variant = "fp16" if lay is half_variant else None
    expected = autoencoder().half() if lay is half_variant else autoencoder()
    back = AutoencoderKL.from_pretrained(
        tmp_path / "back", variant=variant, torch_dtype=next(expected.parameters()).dtype
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    if lay is old_names:  # under the names that it had
        assert "encoder.mid_block.attentions.0.query.weight" in load_file(
            tmp_path / "back" / "diffusion_pytorch_model.safetensors"
        )
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load(tmp_path / "model").autoencoder.encode(images).mean
        wanted = expected.float().encode(images).latent_dist.mean
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 5e-6


def test_a_text_encoder_without_the_unused_head_is_written_without_it_and_runs(tmp_path, caplog):
    family = FAMILIES["text2img"]
    state = compvis_state(family, with_extras=False)
    assert not [name for name in state if "to_logits" in name]
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    known = [
        f"tokenizer={bert_words(tmp_path / 'words')}",
        "scale_factor=1",
        "latent_size=8",
        "diffusion=eps",
        "unet.heads=8",
    ]
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", *known]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/there", "format=diffusers"]) == 0
    assert "to_logits.weight" not in load_file(tmp_path / "there" / "bert" / "model.safetensors")
    with caplog.at_level(logging.ERROR):
        pipeline = LDMTextToImagePipeline.from_pretrained(tmp_path / "there")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red dragon", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    # The whole import again gives the same tensors: none was made up.
    assert (
        main(["export", f"src={tmp_path}/there", f"dst={tmp_path}/back.safetensors", "format=compvis"]) == 0
    )
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[name], tensor) for name, tensor in state.items())
