"""`latents` and `evaluate` take the image size of the model that they read, and say where another one is given."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import webdataset
import yaml
from PIL import Image

from ldmscale.config import EvaluateJob, LatentsJob
from ldmscale.config.inherit import size_warning, trained_size
from ldmscale.config.load import resolved
from ldmscale.errors import ConfigError


def run_of(folder: Path, values: dict) -> Path:
    """A run as far as checks look at it."""
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001" / "COMPLETE").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def folder_of(folder: Path, file: str, values: dict) -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(values))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with webdataset.TarWriter("images.tar") as tar:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64)).save(picture, "PNG")
        tar.write({"__key__": "a", "png": picture.getvalue(), "txt": "a"})
    run_of(tmp_path / "ae", {"job": "autoencoder", "data": {"kind": "images", "image_size": 48}})
    run_of(
        tmp_path / "ldm",
        {
            "job": "diffusion",
            "data": {"kind": "latents", "image_size": None},
            "first_stage": {"path": str(tmp_path / "ae")},
        },
    )
    run_of(tmp_path / "online", {"job": "diffusion", "data": {"kind": "images", "image_size": 64},
                                 "first_stage": {"path": "ae"}})  # fmt: skip
    run_of(
        tmp_path / "silent", {"job": "diffusion", "data": {"kind": "latents"}, "first_stage": {"path": None}}
    )
    run_of(
        tmp_path / "circle",
        {"job": "diffusion", "data": {"kind": "latents"}, "first_stage": {"path": "circle"}},
    )
    vae = {"_class_name": "AutoencoderKL", "sample_size": 512}
    folder_of(tmp_path / "vae", "config.json", vae)
    folder_of(tmp_path / "pipeline", "model_index.json", {})
    folder_of(
        tmp_path / "pipeline", "unet/config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 64}
    )
    folder_of(tmp_path / "pipeline", "vae/config.json", vae)
    imported = {"latent_size": 32, "parts": {"autoencoder": {"channel_mult": [1, 2, 4, 4]}}}
    folder_of(tmp_path / "imported", "model.json", imported)
    folder_of(tmp_path / "damaged", "config.json", {"_class_name": "AutoencoderKL", "sample_size": "big"})
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "pixels"),
    [
        ("ae", 48),
        ("ae/checkpoints/step_00000001", 48),
        ("ldm", 48),
        ("online", 64),
        ("vae", 512),
        ("pipeline", 512),
        ("imported", 256),
        *((name, None) for name in ("silent", "circle", "damaged", "cut", "absent")),
    ],
)
def test_a_model_states_the_size_that_it_was_trained_at(place: Path, model: str, pixels: int | None) -> None:
    assert trained_size(Path(model)) == pixels


JOBS = {
    LatentsJob: ("first_stage.path", ["data.shards=images.tar", "latents.path=out"]),
    EvaluateJob: ("evaluate.model", ["data.shards=images.tar"]),
}


def test_results_go_into_a_run_and_never_into_what_others_made(place: Path) -> None:
    kind = EvaluateJob
    key, words = JOBS[kind]
    own = resolved(kind, [*words, f"{key}=ae"], 1).evaluate.out
    assert own == "ae/evaluation/reconstruction.json"
    elsewhere = resolved(kind, [*words, f"{key}=vae"], 1).evaluate.out
    assert Path(elsewhere).parts[:2] == ("runs", "evaluation") and Path(elsewhere).parts[2].startswith("vae-")
    assert resolved(kind, [*words, f"{key}=vae", "evaluate.out=a.json"], 1).evaluate.out == "a.json"


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_inherits_the_size_and_warns_of_another(place: Path, kind: type) -> None:
    key, words = JOBS[kind]
    for model, pixels in (("ae", 48), ("vae", 512)):
        config = resolved(kind, [*words, f"{key}={model}"], 1)
        assert config.data.image_size == pixels and size_warning(config) is None
        same = resolved(kind, [*words, f"{key}={model}", f"data.image_size={pixels}"], 1)
        assert same == config
    other = size_warning(resolved(kind, [*words, f"{key}=ae", "data.image_size=256"], 1))
    assert other is not None and "data.image_size=256" in other and "48 px" in other


@pytest.mark.parametrize("kind", JOBS)
def test_a_size_that_the_autoencoder_cannot_halve_is_refused_from_its_configuration(
    place: Path, kind: type
) -> None:
    key, words = JOBS[kind]
    values = {
        "job": "autoencoder",
        "data": {"image_size": 64},
        "autoencoder": {"kind": "kl", "channel_mult": [1, 2, 4, 4]},
    }
    run_of(place / "f8", values)
    with pytest.raises(ConfigError, match="no multiple of the factor 8") as error:
        resolved(kind, [*words, f"{key}=f8", "data.image_size=100"], 1)
    assert any("give data.image_size=104" in fault for fault in error.value.faults)
    assert resolved(kind, [*words, f"{key}=f8", "data.image_size=104"], 1).data.image_size == 104


@pytest.mark.parametrize("kind", JOBS)
def test_a_model_without_a_size_asks_for_one_and_an_absent_model_only_for_itself(
    place: Path, kind: type
) -> None:
    key, words = JOBS[kind]
    with pytest.raises(ConfigError) as unknown:
        resolved(kind, [*words, f"{key}=cut"], 1)
    assert [fault for fault in unknown.value.faults if "data.image_size=N" in fault] == list(
        unknown.value.faults
    )
    assert resolved(kind, [*words, f"{key}=cut", "data.image_size=64"], 1).data.image_size == 64
    with pytest.raises(ConfigError) as absent:
        resolved(kind, [*words, f"{key}=absent"], 1)
    assert all("image_size" not in fault for fault in absent.value.faults)
