"""What does not fit is refused: every tensor by name in one message, before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, TEXT, Family, bert_words, compvis_state, first_stage, model_of, unet
from safetensors.torch import load_file, save_file

from ldmscale import load
from ldmscale.cli import main
from ldmscale.config import DiffusionConfig, SpatialConfig
from ldmscale.errors import ConfigError, DataError
from ldmscale.interop.diffusers_folder import write_folder
from ldmscale.interop.writing import write
from ldmscale.models.first_stage import LatentScale


def test_missing_unknown_and_misshaped_tensors_are_named_together(tmp_path, capfd):
    state = compvis_state(FAMILIES["text2img"])
    del state["model.diffusion_model.out.0.bias"]
    del state["model_ema.diffusion_modelout0bias"]
    del state["first_stage_model.decoder.up.0.block.0.norm1.weight"]
    state["model.diffusion_model.middle_block.0.emb_layers.1.bias"] = torch.zeros(3)
    state["cond_stage_model.transformer.norm.bias"] = torch.zeros(2, 2)
    state["model.diffusion_model.adapter.weight"] = torch.zeros(1)
    state["control.weight"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", "unet.heads=8"]) == 2
    told = capfd.readouterr().err
    assert "7 faults" in told
    for sentence in (
        "model.diffusion_model.out.0.bias is missing, expected [32]",
        "model_ema.diffusion_modelout0bias is missing",
        "first_stage_model.decoder.up.0.block.0.norm1.weight is missing",
        "model.diffusion_model.middle_block.0.emb_layers.1.bias has the shape [3], expected [64]",
        "cond_stage_model.transformer.norm.bias has the shape [2, 2], expected [32]",
        "model.diffusion_model.adapter.weight [1] is unknown",
        "control.weight [2] is unknown",
    ):
        assert sentence in told
    assert not (tmp_path / "model").exists()


def test_a_diffusers_folder_is_held_to_the_same(tmp_path, capfd):
    (tmp_path / "there").mkdir()
    write_folder(model_of(FAMILIES["class_table"]), tmp_path / "there", ema=True)
    file = tmp_path / "there" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    tensors |= {"conv_in.bias": torch.zeros(5), "lora.up": torch.zeros(2)}
    save_file(tensors, file)
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 2
    told = capfd.readouterr().err
    assert "conv_out.bias is missing, expected [4]" in told and "lora.up [2] is unknown" in told
    assert "conv_in.bias has the shape [5], expected [32]" in told


def test_settings_that_cannot_be_followed_are_named_together(tmp_path, capfd):
    from diffusers import UNet2DModel

    UNet2DModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "SkipDownBlock2D"), norm_eps=1e-6, freq_shift=1,
        up_block_types=("SkipUpBlock2D", "UpBlock2D"), layers_per_block=1,
    ).save_pretrained(tmp_path / "there")  # fmt: skip
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]) == 2
    told = capfd.readouterr().err
    assert "norm_eps=1e-06" in told and "freq_shift=1" in told and "SkipDownBlock2D" in told


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("faces", ["unet.heads"]),
        ("churches", ["unet.heads"]),
        ("semantic", ["unet.heads", "the number of halvings"]),
        ("odd text", ["unet.heads", "text_encoder.heads"]),
    ],
)
def test_what_shapes_do_not_tell_is_never_guessed_and_not_needed_to_write_a_checkpoint_back(
    family, asked, tmp_path, capfd
):
    odd = Family(unet(heads=4, context_dim=32), first_stage(), replace(TEXT, heads=3, head_channels=10))
    state = compvis_state(FAMILIES.get(family, odd))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model"]) == 0
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/back", "format=compvis"]) == 0
    back = torch.load(tmp_path / "back" / "model.ckpt", weights_only=True)["state_dict"]
    assert set(back) == set(state) and all(torch.equal(back[name], tensor) for name, tensor in state.items())
    written = (tmp_path / "back" / "config.yaml").read_text()
    assert not any(
        word in written for word in ("num_head", "n_stages", "dim_head")
    )  # nothing that nobody said
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/x", "format=diffusers"]) == 2
    told = capfd.readouterr().err
    for path in ("model", "model.ckpt"):
        with pytest.raises(DataError) as error:
            load(tmp_path / path)
        assert len(error.value.faults) == len(asked)
        assert all(name in str(error.value) and name in told for name in asked)
    # Too late: the tensors have been laid out without.
    again = ["import", f"src={tmp_path}/model", f"dst={tmp_path}/y", "unet.heads=4"]
    assert main(again) == 2 and "import the checkpoint itself again" in capfd.readouterr().err


def test_heads_that_do_not_fit_are_refused(tmp_path, capfd):
    torch.save({"state_dict": compvis_state(FAMILIES["faces"])}, tmp_path / "model.ckpt")
    source = ["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model"]
    assert main([*source, "unet.heads=5"]) == 2
    assert "does not divide" in capfd.readouterr().err
    assert main([*source, "unet=faces_f4"]) == 2  # a whole configuration is compared
    assert "unet.channels=224 is given, and the source has 32" in capfd.readouterr().err


def test_what_a_diffusers_folder_says_is_not_overruled_in_silence(tmp_path, capfd):
    from diffusers import AutoencoderKL, DDIMScheduler

    first = AutoencoderKL(block_out_channels=(32,), scaling_factor=0.3)
    first.save_pretrained(tmp_path / "there" / "vae")
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "there" / "scheduler")
    (tmp_path / "there" / ".cache").mkdir()  # a download's
    source = ["import", f"src={tmp_path}/there", f"dst={tmp_path}/model"]
    assert main([*source, "scale_factor=0.5", "diffusion=eps", "unet.heads=8"]) == 2
    told = capfd.readouterr().err
    assert "scale_factor=0.5 is given, and the source has 0.3" in told
    assert "diffusion.beta_end=0.012 is given, and the source's scheduler has 0.02" in told
    assert "unet.heads=8 is given, and the source has no unet" in told
    assert main([*source, "scale_factor=0.3"]) == 0


def test_a_scale_that_the_source_left_open_is_kept_and_written(tmp_path):
    state = compvis_state(FAMILIES["text2img"])
    without = {name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")}
    torch.save({"state_dict": without}, tmp_path / "model.ckpt")
    source = ["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", "unet.heads=8"]
    assert main([*source, "scale_factor=0.25"]) == 0
    assert load(tmp_path / "model").scale.factor.tolist() == [0.25] * 4  # without a first stage, too
    write(scaled(FAMILIES["kl_f8"], scale=None), tmp_path / "there", "diffusers", ema=True, overwrite=False)
    assert main(["import", f"src={tmp_path}/there", f"dst={tmp_path}/kl", "scale_factor=0.5"]) == 0
    assert main(["export", f"src={tmp_path}/kl", f"dst={tmp_path}/back", "format=diffusers"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["scaling_factor"] == 0.5


def test_betas_of_another_schedule_than_given_are_told(tmp_path, capfd):
    torch.save({"state_dict": compvis_state(FAMILIES["class_table"])}, tmp_path / "model.ckpt")
    source = ["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", "unet.heads=2"]
    assert main([*source, "diffusion=eps", "diffusion.beta_end=0.02"]) == 2
    assert "betas are not those of the given configuration" in capfd.readouterr().err
    assert main([*source, "diffusion=eps"]) == 0


def scaled(family: Family, **changes):
    model = model_of(family)
    if model.autoencoder is not None:
        channels = model.autoencoder.latent_width
        model.scale = LatentScale(torch.zeros(channels), torch.ones(channels))
    return replace(model, **changes)


PER_CHANNEL = LatentScale(torch.zeros(4), torch.tensor([1.0, 2.0, 1.0, 1.0]))
UNEXPRESSIBLE = {
    "churches": ("diffusers", scaled(FAMILIES["churches"]), "unet.residual_updown"),
    "inpainting": (
        "diffusers",
        scaled(Family(unet(in_channels=7, heads=4, channel_mult=(1, 2), attention_levels=(0, 1), residual_updown=True))),
        "unet.residual_updown",
    ),
    "heads by number": ("diffusers", scaled(Family(unet(heads=2, attention_levels=(0, 1)))), "one size of a head"),
    "class embedder": ("diffusers", scaled(FAMILIES["class_conditional"]), "class_embedder: diffusers has no such network"),
    "spatial rescaler": ("diffusers", scaled(FAMILIES["semantic"]), "spatial_rescaler: diffusers has no such network"),
    "per-channel scale there": ("diffusers", scaled(FAMILIES["text2img"], scale=PER_CHANNEL), "scale=channel"),
    "per-channel scale": ("compvis", scaled(FAMILIES["text2img"], scale=PER_CHANNEL), "scale=channel"),
    "learned null there": ("diffusers", scaled(FAMILIES["text2img"], learned_null=True), "null_condition=learned"),
    "learned null": ("compvis", scaled(FAMILIES["text2img"], learned_null=True), "null_condition=learned"),
    "velocity": ("compvis", scaled(FAMILIES["class_table"], diffusion=DiffusionConfig(prediction="v")), "prediction=v"),
    "two readers": (
        "compvis",
        scaled(Family(unet(in_channels=7, heads=8, context_dim=32), first_stage(), TEXT, None, SpatialConfig("map", 3, 12, 2))),
        "text_encoder and spatial_rescaler",
    ),
    "groups": ("compvis", scaled(Family(None, first_stage(norm_groups=16))), "autoencoder.norm_groups=16"),
    "groups of a U-Net": ("compvis", scaled(Family(unet(heads=2, context_dim=24, norm_groups=8))), "unet.norm_groups=8"),
    "fractions": ("compvis", scaled(Family(None, first_stage(channel_mult=(1, 1.5), norm_groups=16))), "channel_mult=[1, 1.5]"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNEXPRESSIBLE)
def test_what_a_format_cannot_express_is_refused_by_name_and_nothing_is_written(case, tmp_path):
    form, model, told = UNEXPRESSIBLE[case]
    with pytest.raises(ConfigError) as error:
        write(model, tmp_path / "out", form, ema=True, overwrite=False)
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unknown", ["scale", "diffusion"])
def test_no_pipeline_is_promised_for_a_model_whose_scale_or_schedule_is_unknown(unknown, tmp_path, caplog):
    model = scaled(FAMILIES["text2img"], **{unknown: None})
    write(model, tmp_path / "out", "diffusers", ema=True, overwrite=False)
    assert (
        not (tmp_path / "out" / "model_index.json").exists()
        and (tmp_path / "out" / "unet" / "config.json").exists()
    )
    assert {"scale": "scale_factor=N", "diffusion": "diffusion=NAME"}[unknown] in caplog.text


def test_a_tokenizer_that_a_checkpoint_has_no_place_for_is_told(tmp_path, caplog):
    model = scaled(FAMILIES["text2img"], tokenizer=bert_words(tmp_path / "words"))
    write(model, tmp_path / "out.ckpt", "compvis", ema=True, overwrite=False)
    assert f"tokenizer={tmp_path / 'words'}" in caplog.text


def test_no_pipeline_is_promised_for_a_model_that_joins_an_image_to_its_latent(tmp_path, caplog):
    model = scaled(Family(unet(in_channels=7, heads=8, context_dim=32), first_stage(), TEXT))
    write(model, tmp_path / "out", "diffusers", ema=True, overwrite=False)
    assert not (tmp_path / "out" / "model_index.json").exists() and (tmp_path / "out" / "bert").is_dir()
    assert "no pipeline for its condition" in caplog.text


def test_the_rest_of_such_a_model_can_be_chosen(tmp_path):
    torch.save({"state_dict": compvis_state(FAMILIES["class_conditional"])}, tmp_path / "model.ckpt")
    out = ["export", f"src={tmp_path}/a", f"dst={tmp_path}/out", "format=diffusers", "parts=[unet]"]
    classes = "++class_embedder={classes: 10, width: 24, null_class: true}"
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/a", "unet.heads=1", classes]) == 0
    assert main(out) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"
    }  # fmt: skip


def test_what_is_there_is_kept_unless_it_is_the_same_or_may_go(tmp_path, capfd):
    state = compvis_state(FAMILIES["vq_f4"])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    job = ["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model"]
    assert main(job) == 0 and main(job) == 0  # the same again
    before = (tmp_path / "model" / "autoencoder.safetensors").read_bytes()
    torch.save({"state_dict": state | {"encoder.conv_in.bias": torch.ones(32)}}, tmp_path / "model.ckpt")
    assert main(job) == 2
    assert "overwrite=true" in capfd.readouterr().err
    assert (tmp_path / "model" / "autoencoder.safetensors").read_bytes() == before
    assert main([*job, "overwrite=true"]) == 0
    assert (tmp_path / "model" / "autoencoder.safetensors").read_bytes() != before
    (tmp_path / "model" / "mine.txt").write_text("notes")
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main([*job, "overwrite=true"]) == 2
    assert "mine.txt" in capfd.readouterr().err and (tmp_path / "model" / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model",
        "model.ckpt",
    ]  # no temporary folder is left


def test_places_are_checked_before_anything_is_read(tmp_path, capfd):
    assert main(["import", f"src={tmp_path}/none.ckpt", f"dst={tmp_path}", "config=none.yaml"]) == 2
    told = capfd.readouterr().err
    assert (
        "there is no such file or folder" in told
        and "lie in one another" in told
        and "config=none.yaml" in told
    )
    assert main(["export", f"src={tmp_path}", "dst=x.ckpt", "format=diffusers"]) == 2
    assert "diffusers models are folders" in capfd.readouterr().err


def test_a_run_is_exported_when_it_has_saved_and_never_imported(tmp_path, capfd):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("job: diffusion\n")
    (run / "run.json").write_text("{}")
    assert main(["export", f"src={run}", f"dst={tmp_path}/out", "format=compvis"]) == 2
    assert "no complete checkpoint yet" in capfd.readouterr().err
    assert main(["import", f"src={run}", f"dst={tmp_path}/out"]) == 2
    assert "is a run of ldmscale" in capfd.readouterr().err and not (tmp_path / "out").exists()
