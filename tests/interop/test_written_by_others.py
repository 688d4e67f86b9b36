"""Files as CompVis, Stability and diffusers write them, or as people cut them down: read, or refused with the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from families import FAMILIES, compvis_state
from safetensors.torch import save_file

from ldmscale.errors import DataError
from ldmscale.interop.compvis_config import load_yaml, read_hints
from ldmscale.interop.compvis_names import ema_name, unet_name_of_average
from ldmscale.interop.reading import Given, read

UNET = "model.diffusion_model."


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return compvis_state(FAMILIES["text2img"])


def test_an_interpolation_is_its_value(tmp_path: Path) -> None:
    """huggingface/diffusers#6488: yaml of CompVis refers to its own values."""
    (tmp_path / "m.yaml").write_text(
        """\
start: 0.00085
heads: {count: 8}
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: ${start}
    linear_end: 0.012
    timesteps: 1000
    unet_config: {params: {num_heads: "${heads.count}", name: "${heads.count} heads"}}
    first_stage_config: ${model.params.unet_config}
"""
    )
    values = load_yaml(tmp_path / "m.yaml")
    hints = read_hints(values, "m.yaml")
    assert hints.heads == 8 and hints.diffusion is not None and hints.diffusion.beta_start == 0.00085
    assert values["model"]["params"]["first_stage_config"]["params"]["num_heads"] == 8
    assert values["model"]["params"]["unet_config"]["params"]["name"] == "${heads.count} heads"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: ${b}\nb: ${a}\n", "refers to itself"),
        ("a: ${nothing.there}\n", "names no key of the file"),
        (
            "".join(f"k{n}: ['${{k{n + 1}}}', '${{k{n + 1}}}']\n" for n in range(40)) + "k40: 1\n",
            "expand to more",
        ),
    ],
)
def test_an_interpolation_that_cannot_be_resolved_is_named(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(DataError, match=fault):
        load_yaml(tmp_path / "m.yaml")


def test_names_of_averages_have_one_reading(state: dict[str, torch.Tensor]) -> None:
    """CompVis' LitEma drops the dots of a name; all families, and blocks beyond the ninth, come back."""
    names = {
        name.removeprefix(UNET)
        for family in FAMILIES.values()
        for name in compvis_state(family)
        if name.startswith(UNET)
    }
    names |= {"input_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight", "output_blocks.10.2.conv.bias"}
    assert len(names) > 200
    for name in names:
        assert unet_name_of_average(ema_name("diffusion_model." + name)) == name


def test_averaged_weights_alone_are_the_weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    averages = {
        name: torch.full_like(tensor, 0.25) if name.startswith("model_ema.diffusion_model") else tensor
        for name, tensor in state.items()
        if not name.startswith(UNET)
    }
    assert any(name.startswith("model_ema.diffusion_model") for name in averages)
    torch.save({"state_dict": averages}, tmp_path / "ema.ckpt")
    model = read(tmp_path / "ema.ckpt", Given(unet_heads=8))
    weights = model.parts["unet"].weights
    assert len(weights) > 50 and all((tensor == 0.25).all() for tensor in weights.values())
    assert model.parts["unet"].averaged is None and "autoencoder" in model.parts


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 64, 64),
    }
    return AutoencoderKL(
        in_channels=3, out_channels=3, layers_per_block=1, latent_channels=4, norm_num_groups=32, **blocks
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "500KB"])
def test_a_folder_of_diffusers_is_read_in_pieces_and_variants(
    tmp_path: Path, autoencoder: AutoencoderKL, variant: str | None, size: str
) -> None:
    autoencoder.save_pretrained(tmp_path / "vae", variant=variant, max_shard_size=size)
    pieces = len(list((tmp_path / "vae").glob("*.safetensors")))
    assert (pieces > 1) == (size == "500KB")
    weights = read(tmp_path / "vae").parts["autoencoder"].weights
    wanted = autoencoder.state_dict()
    assert torch.equal(weights["encoder.conv_in.weight"], wanted["encoder.conv_in.weight"])
    assert sum(t.numel() for t in weights.values()) == sum(t.numel() for t in wanted.values())


def test_an_index_without_a_map_is_named(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    autoencoder.save_pretrained(tmp_path / "vae", max_shard_size="500KB")
    index = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(DataError, match="weight_map"):
        read(tmp_path / "vae")


def test_a_first_stage_that_was_cut_out_is_read_or_named(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    first = {
        name: t.contiguous().clone() for name, t in state.items() if name.startswith("first_stage_model.")
    }
    save_file(first, tmp_path / "vae.safetensors")
    model = read(tmp_path / "vae.safetensors")
    assert list(model.parts) == ["autoencoder"]
    found = model.parts["autoencoder"].weights["encoder.conv_in.weight"]
    assert torch.equal(found, first["first_stage_model.encoder.conv_in.weight"])


@pytest.mark.parametrize(
    "name", ["m.ckpt", "m.safetensors", "vae/diffusion_pytorch_model.safetensors", "vae/config.json"]
)
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, autoencoder: AutoencoderKL, name: str) -> None:
    """huggingface/transformers#27923, codefuse-ai/MFTCoder#20: a clone without Git LFS has three lines in place of the weights."""
    autoencoder.save_pretrained(tmp_path / "vae")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1034\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match="git lfs pull"):
        read(tmp_path / name if "/" not in name else tmp_path / "vae")
