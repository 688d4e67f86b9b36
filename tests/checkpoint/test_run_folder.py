"""The run folder: what a resume may change, who holds it, and when a run counts as finished."""

import os

import pytest

from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import AutoencoderJob, DiffusionJob
from ldmscale.config.compose import compose_job
from ldmscale.config.resume import changes
from ldmscale.config.typed import plain, read
from ldmscale.errors import ConfigError
from ldmscale.storage.lease import LeaseHeldError


def test_a_resume_may_change_how_it_runs_but_not_what_is_learnt(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = {"seed": 0, "zero": {"stage": 3}, "optim": {"lr": 1e-4, "betas": [0.9, 0.99]}}
    assert changes(folder, config) == []
    folder.settle_config(config)
    assert changes(folder, config) == []
    assert changes(folder, {**config, "zero": {"stage": 1}}) == ["zero.stage was 3, is 1"]
    with pytest.raises(ConfigError) as error:
        changes(folder, {**config, "seed": 1, "optim": {"lr": 1e-3, "betas": [0.9, 0.99]}})
    assert [fault.split(",")[0] for fault in error.value.faults] == ["optim.lr=0.001", "seed=1"]
    folder.settle_config({**config, "seed": 1})
    assert folder.config() == config  # written once


def test_a_run_of_another_job_is_reported_by_that_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.settle_config(plain(read(AutoencoderJob, compose_job("autoencoder", ["experiment=smoke"]))))
    with pytest.raises(ConfigError) as error:
        changes(folder, plain(read(DiffusionJob, compose_job("diffusion", ["experiment=smoke"]))))
    (fault,) = error.value.faults
    assert "holds a run of the job autoencoder, and this is diffusion" in fault and "run.name" in fault


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = plain(read(DiffusionJob, compose_job("diffusion", ["experiment=smoke"])))
    older = {key: value for key, value in config.items() if key not in ("class_embedder", "spatial")}
    older["data"] = {key: value for key, value in config["data"].items() if key != "label"}
    folder.settle_config(older)
    assert changes(folder, config) == []
    with pytest.raises(ConfigError, match=r"data\.label='cls', but .* was started with 'json:label'"):
        changes(folder, {**config, "data": {**config["data"], "label": "cls"}})


def test_a_folder_is_held_by_one_start_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    held = folder.hold()
    with pytest.raises(
        LeaseHeldError, match=rf"in use by process {os.getpid()} on .*, since .*, last sign of life 0 s"
    ):
        RunFolder(tmp_path / "run").hold()
    held.release()
    again = RunFolder(tmp_path / "run").hold()
    assert again.number == held.number + 1
    again.release()


def test_attempts_are_counted_and_the_identity_stays(tmp_path):
    folder = RunFolder(tmp_path / "run")
    first, second = folder.begin_attempt(1), folder.begin_attempt(2)
    assert (first["attempts"], second["attempts"]) == (1, 2)
    assert first["wandb_id"] == second["wandb_id"]
    assert folder.finished_step() is None
    folder.note({**second, "finished_step": 7})
    assert folder.finished_step() == 7
    folder.begin_attempt(3)  # with a larger train.max_steps: unfinished again
    assert folder.finished_step() is None


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        RunFolder(tmp_path).config()
