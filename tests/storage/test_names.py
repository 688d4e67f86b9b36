"""Names that files bring: the forms that are written here are accepted, and no other name is opened or created."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldmscale.checkpoint.folders import step_of
from ldmscale.checkpoint.manifest import merge, read_manifest, write_manifest
from ldmscale.checkpoint.shards import Piece, Reader, mark_complete, write_pieces
from ldmscale.data.latents.folder import LatentFolder
from ldmscale.data.latents.format import LatentManifest
from ldmscale.errors import CheckpointError, DataError, LdmscaleError
from ldmscale.interop.diffusers_folder import read_folder
from ldmscale.interop.model import Model, read_model, write_model
from ldmscale.storage import names
from ldmscale.storage.names import Form, accepted, has_form, shown

FORMS = [value for value in vars(names).values() if isinstance(value, Form)]
WRITTEN = {
    "rank_00000.safetensors": names.RANK_FILE,
    "rank_123456.safetensors": names.RANK_FILE,
    "diffusion_pytorch_model-00001-of-00002.safetensors": names.SAFETENSORS,
    "diffusion_pytorch_model.non_ema.safetensors": names.SAFETENSORS,
    "00000.tar": names.TAR,
    "scenes-train-00000.tar": names.TAR,
    "vqvae": names.FOLDER,
    "text_encoder_2": names.FOLDER,
    "metrics.jsonl": names.PLAIN,
    "räume 1.txt": names.PLAIN,
    "0" * 64: names.SHA256,
    "1234567": names.SLURM_JOB,
    "3f9a01bc": names.WANDB_ID,
}
# Each also with the ending that a form asks for.
HOSTILE: list[Any] = [
    "", ".", "..", "../x", "../../x", "x/../../y", "/etc/passwd", "//x", "x/y", "x/", "./x", "..\\x", "C:\\x", "\\\\host\\x",
    ".bashrc", ".", "-rf", "--wrap=x", "x\n", "x\ny", "x\ty", "x\x00y", "x\x1b]0;y\x07", "x\u202ey", "x\u2028y", "x\udcffy",
    "x" * 300, "é" * 200, None, 5, 1.5, True, ["x"], {"x": 1}, b"x",
]  # fmt: skip
ENDINGS = ("", ".safetensors", ".tar")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_here_is_accepted(name: str) -> None:
    assert accepted(name, WRITTEN[name], "here", DataError) == name


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_form_accepts_a_name_that_leads_elsewhere_or_cannot_be_shown(name: Any) -> None:
    for full in [name + ending for ending in ENDINGS] if isinstance(name, str) else [name]:
        for form in FORMS:
            assert not has_form(full, form), (full, form.words)
            with pytest.raises(CheckpointError) as refused:
                accepted(full, form, "manifest.json", CheckpointError)
            told = str(refused.value)
            assert told.startswith(f"manifest.json names {shown(full)}: expected {form.words}")
            assert told.isprintable() and len(told) < 400


def test_steps_that_are_no_numbers_of_ours_are_no_checkpoints() -> None:
    assert step_of(Path("step_00001000")) == 1000
    for name in (
        "step_1",
        "step_" + "9" * 5000,
        "step_٣٣٣٣٣٣٣٣",
        "step_00000001.tmp",
        "step_00000001\n",
        "xstep_00000001",
    ):
        assert step_of(Path(name)) is None, name


def edit(file: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    part = write_pieces(folder / "rank_00000.safetensors", 0, [Piece("net/master/w", (2,), 0, torch.ones(2))])
    write_manifest(folder, merge([part], step=3, state={"images_seen": 9}))
    mark_complete(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "sub/rank_00000.safetensors", "x.py", 5, None], ids=ascii
)
def test_a_manifest_opens_only_files_of_ranks_in_its_own_folder(
    name: Any, checkpoint: Path, tmp_path: Path
) -> None:
    outside = checkpoint.parent / "outside.safetensors"
    for copy in (outside, checkpoint / "x.py", checkpoint / "sub" / "rank_00000.safetensors"):
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(checkpoint / "rank_00000.safetensors", copy)  # so that nothing but the name is wrong
    name = str(outside) if name == "{outside}" else name
    assert float(Reader(checkpoint).tensor("net/master/w")[0]) == 1.0
    edit(checkpoint / "manifest.json", lambda values: values["files"][0].update(name=name))
    mark_complete(checkpoint)
    with pytest.raises(CheckpointError) as refused:
        Reader(checkpoint)
    assert (
        "expected rank_00000.safetensors" in str(refused.value) and len(str(refused.value).splitlines()) == 1
    )
    with pytest.raises(CheckpointError):
        read_manifest(checkpoint)


def latents(tmp_path: Path, name: Any) -> None:
    format = {"autoencoder": "a", "kind": "latent", "dtype": "float32", "shape": [4, 2, 2], "transform": {}}
    rest = {"samples": 1, "skipped": 0, "scale_factor": 1.0, "channel_mean": [0.0], "channel_std": [1.0]}
    record = {"version": "ldmscale-latents-1", "format": format, "shards": ["00000.tar", name], **rest}
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    LatentManifest.load(tmp_path)


def latent_record(tmp_path: Path, name: Any) -> None:
    (tmp_path / ".00000.tar.x").mkdir()
    (tmp_path / "secret.part").write_text("of another")
    (tmp_path / "00000.json").write_text(json.dumps({"sha256": name, "bytes": 10}))
    LatentFolder(tmp_path).settled("00000.tar")


def weight_map(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **UNET}))
    index = {"weight_map": {"conv_in.weight": name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    read_folder(folder)


UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [32, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8, "norm_num_groups": 32,
}  # fmt: skip


def model_json(change: Callable[[dict[str, Any], Any], None]) -> Callable[[Path, Any], None]:
    def read(tmp_path: Path, name: Any) -> None:
        source = {
            "format": "diffusers",
            "layout": "folders",
            "components": {},
            "index": None,
            "tokenizer": "tokenizer",
        }
        source["scheduler"] = {"name": "scheduler", "config": {}}
        source["components"] = {"unet": {"name": "unet", "file": "diffusion_pytorch_model.safetensors"}}
        folder = tmp_path / "model"
        folder.mkdir()
        write_model(Model(source=source), folder)
        assert read_model(folder).source == source
        edit(folder / "model.json", lambda values: change(values, name))
        read_model(folder)

    return read


ENTRIES: dict[str, Callable[[Path, Any], None]] = {
    "shards of a manifest of latents": latents,
    "checksum of a shard of latents": latent_record,
    "weight_map of an index": weight_map,
    "scheduler of an imported model": model_json(
        lambda values, name: values["source"]["scheduler"].update(name=name)
    ),
    "tokenizer of an imported model": model_json(
        lambda values, name: values["source"].update(tokenizer=name)
    ),
    "folder of a component": model_json(
        lambda values, name: values["source"]["components"]["unet"].update(name=name)
    ),
    "file of a component": model_json(
        lambda values, name: values["source"]["components"]["unet"].update(file=name)
    ),
    "part of an imported model": model_json(lambda values, name: values["parts"].update({str(name): {}})),
}


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "x/../../secret", ".hidden", "a\x1bb", 5], ids=ascii
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_name_in_a_file_leads_nowhere_else(entry: str, name: Any, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(LdmscaleError) as refused:
        ENTRIES[entry](place, name)
    assert isinstance(refused.value, DataError)
    assert "expected" in str(refused.value) and str(refused.value).isprintable(), str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    if entry.startswith("checksum"):
        assert (place / "secret.part").read_text() == "of another"
