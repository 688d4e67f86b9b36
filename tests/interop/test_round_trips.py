"""Every family through `ldmscale import` and `ldmscale export`: each tensor of the source comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, averages, compvis_state, model_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmscale.cli import main
from ldmscale.interop.compvis import to_state
from ldmscale.interop.diffusers_folder import write_folder

EXPRESSIBLE = [name for name, family in FAMILIES.items() if family.diffusers]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def given(name: str) -> list[str]:
    family = FAMILIES[name]
    spatial = ["++spatial={kind: map, channels: 3, map_classes: 12, halvings: 2}"] if family.spatial else []
    classes = ["++class_embedder={classes: 10, width: 24, null_class: true}"] if family.class_embedder else []
    return [*family.given, *spatial, *classes]


def files_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_comes_back_with_everything_that_was_in_it(name, tmp_path):
    dtype = {"text2img": torch.float16, "kl_f8": torch.bfloat16}.get(name, torch.float32)
    state = compvis_state(FAMILIES[name], dtype)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", *given(name)]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/out", "format=compvis"]) == 0
    assert_same(torch.load(tmp_path / "out" / "model.ckpt", weights_only=True)["state_dict"], state)


@pytest.mark.parametrize("name", ["text2img", "faces", "vq_f8"])
def test_safetensors_come_back_too(name, tmp_path):
    state = compvis_state(FAMILIES[name])
    save_file({key: t.contiguous() for key, t in state.items()}, tmp_path / "model.safetensors")
    assert main(["import", f"src={tmp_path}/model.safetensors", f"dst={tmp_path}/model", *given(name)]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/m.safetensors", "format=compvis"]) == 0
    assert_same(load_file(tmp_path / "m.safetensors"), state)
    assert (tmp_path / "m.yaml").is_file()


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_diffusers_folder_comes_back(name, tmp_path):
    model = model_of(FAMILIES[name])
    if "unet" in model.parts and "autoencoder" in model.parts:
        from ldmscale.models.first_stage import LatentScale

        channels = model.autoencoder.latent_width
        model.scale = LatentScale(torch.zeros(channels), torch.full((channels,), 0.18215))
    (tmp_path / "there").mkdir()
    write_folder(model, tmp_path / "there", ema=True)
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/back", "format=diffusers"]) == 0
    there, back = files_of(tmp_path / "there"), files_of(tmp_path / "back")
    assert list(there) == list(back)
    for file, tensors in there.items():
        assert_same(back[file], tensors)
    jsons = {p.relative_to(tmp_path / "there"): p.read_text() for p in (tmp_path / "there").rglob("*.json")}
    assert jsons == {
        p.relative_to(tmp_path / "back"): p.read_text() for p in (tmp_path / "back").rglob("*.json")
    }


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_from_compvis_to_diffusers_and_back_nothing_is_lost(name, tmp_path):
    state = compvis_state(FAMILIES[name])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    known = ["scale_factor=0.18215", "latent_size=8"]
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/a", *known, *given(name)]) == 0
    assert main(["export", f"src={tmp_path}/a", f"dst={tmp_path}/there", "format=diffusers"]) == 0
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/b"]) == 0
    assert main(["export", f"src={tmp_path}/b", f"dst={tmp_path}/out.ckpt", "format=compvis"]) == 0
    assert_same(torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"], state)


def test_which_copy_diffusers_loads_is_a_choice_and_the_other_lies_beside(tmp_path):
    state = compvis_state(FAMILIES["class_table"])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/a", "unet.heads=2"]) == 0
    for ema, beside in (("true", "non_ema"), ("false", "ema")):
        there = tmp_path / beside
        assert main(["export", f"src={tmp_path}/a", f"dst={there}", "format=diffusers", f"ema={ema}"]) == 0
        files = files_of(there)
        main_file, other = (
            files["diffusion_pytorch_model.safetensors"],
            files[f"diffusion_pytorch_model.{beside}.safetensors"],
        )
        raw, averaged = (other, main_file) if ema == "true" else (main_file, other)
        assert torch.equal(raw["conv_in.weight"], state["model.diffusion_model.input_blocks.0.0.weight"])
        assert torch.equal(averaged["conv_in.weight"] * 2, raw["conv_in.weight"])
        assert main(["import", f"src={there}", f"dst={tmp_path}/{beside}_model"]) == 0
        assert (
            main(
                [
                    "export",
                    f"src={tmp_path}/{beside}_model",
                    f"dst={tmp_path}/{beside}.ckpt",
                    "format=compvis",
                ]
            )
            == 0
        )
        assert_same(torch.load(tmp_path / f"{beside}.ckpt", weights_only=True)["state_dict"], state)


def test_averages_are_named_as_litema_names_them():
    model = model_of(FAMILIES["faces"])
    part = model.parts["unet"]
    part.averaged = {name: tensor * 0.5 for name, tensor in part.weights.items()}
    state = to_state(model)
    expected = averages({key: t for key, t in state.items() if key.startswith("model.")})
    assert "model_ema.diffusion_modelinput_blocks00weight" in state
    assert_same(
        {k: t for k, t in state.items() if k.startswith("model_ema.")},
        {k: t for k, t in expected.items() if k in state},
    )
