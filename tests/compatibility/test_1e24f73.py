"""Run folders and latents that commit 1e24f73 wrote (make_fixture.py) load, resume and finish as they do there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_fixture as old
import pytest
import recorded_outputs

OLD_STEP = f"step_{old.DIFFUSION_STEPS[0]:08d}"
Ldmscale = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def archive() -> dict[str, bytes]:
    """Contents of the files by name."""
    with tarfile.open(old.ARCHIVE) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def recorded(archive: dict[str, bytes]) -> dict[str, Any]:
    return dict(json.loads(archive["recorded.json"]))


@pytest.fixture
def place(archive: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of the archive, in the working directory.

    config.yaml names the autoencoder by an absolute path, which becomes that of this folder.
    """
    for name, content in archive.items():
        if name.endswith("/config.yaml"):
            content = content.replace(old.MOUNTED.encode(), str(tmp_path).encode())
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for shard in (tmp_path / "images").glob("*.tar"):
        os.utime(shard, ns=(old.IMAGES_TIME, old.IMAGES_TIME))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends(done: subprocess.CompletedProcess[str], status: int = 0) -> str:
    output = done.stdout + done.stderr
    assert done.returncode == status, output[-6000:]
    return output


def alike(values: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same keys, token ids and counts; numbers up to what another processor's order of sums may change."""
    assert set(values) == set(expected)
    for key, value in values.items():
        if isinstance(value, list) and isinstance(value[0], float):
            assert value == pytest.approx(expected[key], rel=1e-4, abs=2e-6), key
        else:
            assert value == expected[key], key


def test_the_archive_is_small_and_names_no_machine(archive: dict[str, bytes]) -> None:
    assert old.ARCHIVE.stat().st_size < 200_000
    for name, content in archive.items():
        if not name.endswith((".safetensors", ".tar")):
            paths = set(re.findall(rb"[\"' =(](/\w+)", content))
            assert paths <= {old.MOUNTED.encode()}, name
        for host in re.findall(rb'"host": "([^"]*)"', content):
            assert host == b"localhost", name
    files = {"config.yaml", "run.json", "metrics.jsonl", "data_ledger.jsonl", "checkpoints/latest"}
    assert {f"{run}/{file}" for run in ("autoencoder", "diffusion") for file in files} <= set(archive)
    assert "diffusion/tokenizer/tokenizer.json" in archive
    assert archive["autoencoder/data_ledger.jsonl"].strip()
    assert len([name for name in archive if name.startswith(f"diffusion/checkpoints/{OLD_STEP}/rank_")]) == 2


def test_load_and_sample_give_the_recorded_outputs(place: Path, recorded: dict[str, Any]) -> None:
    alike(recorded_outputs.of_autoencoder(Path("autoencoder")), recorded["autoencoder"])
    found = recorded_outputs.of_diffusion(Path("diffusion"))
    alike(found, recorded["diffusion"])
    # The averages are others than the weights: neither stands for the other.
    assert found["averaged"] != pytest.approx(found["raw"], rel=1e-4, abs=2e-6)


def test_build_gives_the_recorded_networks(recorded: dict[str, Any]) -> None:
    alike(recorded_outputs.of_build(), recorded["build"])


@pytest.mark.distributed
def test_the_diffusion_run_resumes_with_the_same_losses_and_averages(
    place: Path, recorded: dict[str, Any], archive: dict[str, bytes], ldmscale: Ldmscale
) -> None:
    ends(ldmscale(*old.diffusion(old.DIFFUSION_STEPS[1]), cwd=place, ranks=2))
    run = place / "diffusion"
    assert old.losses(run) == pytest.approx(recorded["losses_diffusion"], rel=1e-6)
    alike(recorded_outputs.of_diffusion(Path("diffusion")), recorded["resumed_diffusion"])
    # The history of the run goes on: its metrics, its W&B run and its count of starts.
    assert (run / "metrics.jsonl").read_bytes().startswith(archive["diffusion/metrics.jsonl"])
    before, after = json.loads(archive["diffusion/run.json"]), json.loads((run / "run.json").read_text())
    assert (after["wandb_id"], after["attempts"]) == (before["wandb_id"], before["attempts"] + 1)
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == archive[
        "diffusion/tokenizer/tokenizer.json"
    ]


def test_the_diffusion_run_resumes_on_one_rank_without_sharding(
    place: Path, recorded: dict[str, Any], ldmscale: Ldmscale
) -> None:
    steps = f"train.max_steps={old.DIFFUSION_STEPS[1]}"
    ends(ldmscale(*old.DIFFUSION, *old.WHOLE, "run.dir=diffusion", steps, cwd=place))
    assert old.losses(place / "diffusion") == pytest.approx(recorded["losses_diffusion"], rel=1e-5)


@pytest.mark.distributed
def test_the_autoencoder_run_resumes_and_measures_the_same_scale(
    place: Path, recorded: dict[str, Any], ldmscale: Ldmscale
) -> None:
    ends(ldmscale(*old.autoencoder(old.AUTOENCODER_STEPS[1]), cwd=place, ranks=2))
    assert old.losses(place / "autoencoder") == pytest.approx(recorded["losses_autoencoder"], rel=1e-5)
    alike(recorded_outputs.of_autoencoder(Path("autoencoder")), recorded["resumed_autoencoder"])
    statistics = recorded_outputs.ldmscale.load("autoencoder").latent_statistics
    assert statistics is not None and statistics.keys() == recorded["latent_statistics"].keys()
    assert statistics["factor"] == pytest.approx(recorded["latent_statistics"]["factor"], rel=1e-5)


def test_a_new_run_trains_on_the_old_latents(
    place: Path, recorded: dict[str, Any], ldmscale: Ldmscale
) -> None:
    ends(ldmscale(*old.DIFFUSION, *old.WHOLE, "run.dir=fresh", "train.max_steps=2", cwd=place))
    assert old.losses(place / "fresh") == pytest.approx(recorded["losses_fresh"], rel=1e-5)


def test_the_old_latents_are_complete_and_are_not_written_again(place: Path, ldmscale: Ldmscale) -> None:
    def files() -> dict[str, tuple[bytes, int]]:
        return {
            path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.glob("latents/[0m]*")
        }

    before = files()
    assert set(before) == {"00000.tar", "00000.json", "00001.tar", "00001.json", "manifest.json"}
    ends(ldmscale(*old.LATENTS, cwd=place))
    assert files() == before
    # Where a shard is missing it is encoded again, to the same bytes but for what the encoder's sums round.
    missing = place / "latents" / "00001.tar"
    missing.unlink()
    (place / "latents" / "00001.json").unlink()
    ends(ldmscale(*old.LATENTS, cwd=place))
    assert files()["00000.tar"] == before["00000.tar"]
    assert missing.stat().st_size == len(before["00001.tar"][0])


def test_the_doctor_reads_the_stopped_run(place: Path, ldmscale: Ldmscale) -> None:
    text = ends(ldmscale("doctor", "run.dir=diffusion", cwd=place))
    assert f"{OLD_STEP} was read whole" in text
    assert re.search(r"\bstep 2 of 5\b", text), text
