"""Weights that cannot fit are reported from the configurations, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ldmscale.config import AutoencoderJob, DiffusionJob
from ldmscale.config.compose import compose_job
from ldmscale.config.load import resolved
from ldmscale.config.typed import plain, read
from ldmscale.errors import ConfigError

SMOKE = "experiment=smoke"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of each kind, as far as its configuration and the mark of a checkpoint go."""
    monkeypatch.chdir(tmp_path)
    for name, kind in (("autoencoder", AutoencoderJob), ("diffusion", DiffusionJob)):
        saved(tmp_path / name, plain(read(kind, compose_job(name, [SMOKE]))))
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text((tmp_path / "diffusion" / "config.yaml").read_text())
    return tmp_path


def saved(folder: Path, values: dict) -> None:
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001" / "COMPLETE").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def faults(kind: type, path: str, *words: str) -> str:
    try:
        resolved(kind, [SMOKE, f"warm_start.path={path}", *words], 1)
    except ConfigError as error:
        return "\n".join(error.faults)
    return ""


@pytest.mark.parametrize(
    ("kind", "path", "words", "expected"),
    [
        (DiffusionJob, "diffusion", [], ""),
        (DiffusionJob, "diffusion/checkpoints/step_00000001", [], ""),
        (DiffusionJob, "diffusion", ["unet.dropout=0.1", "unet.checkpointing=full", "optim.lr=1e-5"], ""),
        (
            DiffusionJob,
            "diffusion",
            ["text_encoder.max_tokens=11"],
            "text_encoder.max_tokens=11, but warm_start.path=",
        ),
        (DiffusionJob, "diffusion", ["unet.channels=64"], "give unet.channels=32"),
        (DiffusionJob, "diffusion", ["~text_encoder", "unet.context_dim=null"], "has one, text_encoder"),
        (DiffusionJob, "autoencoder", [], "is a run of the job autoencoder"),
        (DiffusionJob, "young", [], "no complete checkpoint yet"),
        (DiffusionJob, "absent", [], "there is nothing there"),
        (AutoencoderJob, "autoencoder", [], ""),
        (AutoencoderJob, "autoencoder", ["loss.kl_weight=0.1", "autoencoder.norm_groups=16"], ""),
        (
            AutoencoderJob,
            "autoencoder",
            ["autoencoder.latent_channels=8"],
            "give autoencoder.latent_channels=4",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(
    runs: Path, kind: type, path: str, words: list[str], expected: str
) -> None:
    found = faults(kind, path, *words)
    assert (expected in found) if expected else found == ""


def test_a_run_that_resumes_takes_no_weights_and_is_not_checked(runs: Path) -> None:
    saved(runs / "mine", {})
    assert faults(DiffusionJob, "autoencoder", "run.dir=mine") == ""
