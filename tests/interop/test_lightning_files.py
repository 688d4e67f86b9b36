""".ckpt files as Lightning writes them are read whole; files that would run something are refused and run nothing."""

from __future__ import annotations

import os
import pickle
import sys
import types
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import FAMILIES, compvis_state
from omegaconf import OmegaConf

from ldmscale import load
from ldmscale.cli import main
from ldmscale.interop.pickles import plain, read_pickle


@pytest.fixture
def model_checkpoint(monkeypatch) -> type:
    """A class that pickles under the name of Lightning's callback, and that no reader can import."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    made = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = made
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return made


def lightning_file(path: Path, callback: type, state: dict, legacy: bool = False) -> dict:
    """What pytorch-lightning 1.4 and later leave, with OmegaConf and numpy objects inside."""
    settings = {
        "unet_config": {"params": {"num_heads": 2}},
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 8,
    }
    moments = {"step": 5, "exp_avg": torch.randn(3, 2), "exp_avg_sq": torch.rand(3, 2)}
    rest = {
        "epoch": 3,
        "global_step": np.int64(390_000),
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {callback: {"best_model_score": torch.tensor(0.25), "current_score": np.float32(0.5), "monitor": "val/loss"}},
        "optimizer_states": [
            {"state": {0: moments}, "param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": [0]}]}
        ],
        "lr_schedulers": [defaultdict(dict, last_epoch=np.array(7, dtype=">i4")[()])],
        "hyper_parameters": OmegaConf.create(settings),
        "hparams_name": "kwargs",
        "loops": OrderedDict(done=True, of=Namespace(steps=4)),
    }  # fmt: skip
    torch.save({"state_dict": state, **rest}, path, _use_new_zipfile_serialization=not legacy)
    return rest


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "before PyTorch 1.6"])
def test_a_lightning_file_is_read_and_its_tensors_come_back(legacy, tmp_path, model_checkpoint, monkeypatch):
    state = compvis_state(FAMILIES["class_table"])
    rest = lightning_file(tmp_path / "last.ckpt", model_checkpoint, state, legacy)
    monkeypatch.undo()  # from here on there is no Lightning
    # The heads come from the file's own hyper_parameters.
    assert main(["import", f"src={tmp_path}/last.ckpt", f"dst={tmp_path}/model"]) == 0
    parts = load(tmp_path / "model", ema=False)
    assert parts.unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 2
    assert parts.schedule.timesteps == 1000 and parts.latent_shape == (4, 8, 8)

    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/out.ckpt", "format=compvis"]) == 0
    back = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert all(torch.equal(back["state_dict"][name], tensor) for name, tensor in state.items())
    assert set(back) == {"state_dict", *rest}
    moments = rest["optimizer_states"][0]["state"][0]
    assert torch.equal(back["optimizer_states"][0]["state"][0]["exp_avg"], moments["exp_avg"])
    assert back["optimizer_states"][0]["param_groups"][0] == {
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "params": [0],
    }
    callback = back["callbacks"]["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
    assert callback["current_score"] == 0.5 and float(callback["best_model_score"]) == 0.25
    assert back["global_step"] == 390_000 and back["lr_schedulers"][0]["last_epoch"] == 7
    assert back["hyper_parameters"]["unet_config"] == {"params": {"num_heads": 2}}


def test_omegaconf_is_understood_without_being_called(tmp_path):
    torch.save({"hyper_parameters": OmegaConf.create({"a": [1, {"b": "x"}], "c": None})}, tmp_path / "f.ckpt")
    assert plain(read_pickle(tmp_path / "f.ckpt")["hyper_parameters"]) == {"a": [1, {"b": "x"}], "c": None}


class Command:
    def __init__(self, marker: Path, function=os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self):
        argument = f"open({str(self.marker)!r}, 'w')" if self.function is eval else f"touch {self.marker}"
        return self.function, (argument,)


@pytest.mark.parametrize(("function", "told"), [(os.system, "posix.system"), (eval, "builtins.eval")])
@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "before PyTorch 1.6"])
def test_a_file_that_would_run_something_is_refused_by_name_and_runs_nothing(
    legacy, function, told, tmp_path, capfd
):
    marker = tmp_path / "ran"
    values = {"state_dict": compvis_state(FAMILIES["vq_f4"]), "callbacks": [Command(marker, function)]}
    torch.save(values, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=not legacy)
    assert main(["import", f"src={tmp_path}/evil.ckpt", f"dst={tmp_path}/model"]) == 2
    assert told in capfd.readouterr().err
    assert not marker.exists() and not (tmp_path / "model").exists()
    pickle.loads(pickle.dumps(Command(marker, function)))  # it would have
    assert marker.exists()


def test_a_newer_pickle_protocol_cannot_hide_a_name(tmp_path, capfd):
    marker = tmp_path / "ran"
    torch.save({"state_dict": {}, "x": Command(marker)}, tmp_path / "evil.ckpt", pickle_protocol=4)
    assert main(["import", f"src={tmp_path}/evil.ckpt", f"dst={tmp_path}/model"]) == 2
    assert "posix.system" in capfd.readouterr().err and not marker.exists()


def test_a_pickle_inside_a_diffusers_folder_is_held_to_the_same(tmp_path, capfd):
    from diffusers import VQModel

    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path / "vq")
    (tmp_path / "vq" / "diffusion_pytorch_model.safetensors").unlink()
    marker = tmp_path / "ran"
    torch.save({"a": torch.zeros(1), "b": Command(marker)}, tmp_path / "vq" / "diffusion_pytorch_model.bin")
    assert main(["import", f"src={tmp_path}/vq", f"dst={tmp_path}/model"]) == 2
    assert "posix.system" in capfd.readouterr().err and not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_what_is_no_checkpoint_is_told_so(content, tmp_path, capfd):
    (tmp_path / "model.ckpt").write_bytes(content)
    (tmp_path / "cut.safetensors").write_bytes(content)
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model"]) == 2
    assert "is no checkpoint that PyTorch wrote" in capfd.readouterr().err
    assert main(["import", f"src={tmp_path}/cut.safetensors", f"dst={tmp_path}/model"]) == 2
    assert "is no whole safetensors file" in capfd.readouterr().err


def test_the_yaml_beside_a_checkpoint_tells_the_heads(tmp_path):
    state = compvis_state(FAMILIES["faces"])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    params = {
        "image_size": 16, "scale_factor": 0.5, "linear_start": 0.00085, "linear_end": 0.012,
        "unet_config": {"target": "x", "params": {"num_head_channels": 16, "num_heads": 8}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    parts = load(tmp_path / "model.ckpt")
    assert parts.unet.mid_block.attentions[0].heads == 6  # 96 channels in heads of 16
    assert parts.latent_shape == (3, 16, 16) and parts.scale.factor.tolist() == [0.5] * 3
