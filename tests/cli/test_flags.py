"""What --help, --cfg job, --config-dir, --multirun and hydra.searchpath claim, they do for every job."""

from pathlib import Path

import pytest
import yaml

from ldmscale.cli import main
from ldmscale.config import JOBS, ClusterConfig
from ldmscale.config.compose import compose_job
from ldmscale.config.flags import parse
from ldmscale.config.load import resolved
from ldmscale.errors import ConfigError

MINE = """# @package _global_
defaults: [smoke_autoencoder, _self_]
run: {name: mine}
optim: {lr: 7.0e-4}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of configurations of one's own."""
    own = tmp_path / "süß, conf's"
    for name, text in (
        ("experiment/mine", MINE),
        ("cluster/site", "nodes: 2\ntasks_per_node: 3\n"),
        ("zero/9", "stage: 1\n"),
    ):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / f"{name}.yaml").write_text(text)
    return own


def test_a_folder_of_ones_own_is_searched_by_run_precheck_and_cfg(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in (["--config-dir", str(folder)], [f"--config-dir={folder}"], ["-cd", folder.name]):
        words = parse("autoencoder", [*option, "experiment=mine", "zero=9"]).overrides
        config = resolved(JOBS["autoencoder"], words, 1)
        assert (config.optim.lr, config.run.dir, config.zero.stage) == (7.0e-4, "runs/mine", 1)
        assert main(["autoencoder", *option, "experiment=mine", "--cfg", "job"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 7.0e-4
        assert main(["autoencoder", *option, "experiment=mine", "train.max_stepz=1"]) == 2
        said = capsys.readouterr().err
        assert "did you mean train.max_steps" in said and "mine" not in said.replace("experiment=mine", "")
    assert main(["autoencoder", *option, "experiment=mien"]) == 2
    assert "did you mean mine" in capsys.readouterr().err


def test_hydras_search_path_is_the_same(folder):
    quoted = str(folder).replace("'", "\\'")
    for path in (quoted, f"file://{quoted}"):
        assert (
            compose_job("autoencoder", [f"hydra.searchpath=['{path}']", "experiment=mine"])["run"]["name"]
            == "mine"
        )


def test_a_folder_is_searched_in_a_sweep_too(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = [
        "autoencoder",
        "--config-dir",
        str(folder),
        "--multirun",
        "experiment=mine",
        "optim.lr=1e-4,1e-3",
        "train.max_steps=x",
    ]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "train.max_steps='x'" in said and "1 fault:" in said


def test_what_would_never_be_read_is_refused(folder, capsys):
    (folder / "experiment" / "smoke_autoencoder.yaml").write_text(MINE)
    assert main(["autoencoder", "--config-dir", str(folder), "experiment=smoke"]) == 2
    assert "goes first" in capsys.readouterr().err
    assert main(["autoencoder", "--config-dir", str(folder / "nowhere")]) == 2
    assert "expected a folder" in capsys.readouterr().err


def test_a_submission_shows_what_it_would_submit(folder, capsys):
    line = [
        "submit",
        "autoencoder",
        "--config-dir",
        str(folder),
        "cluster=site",
        "experiment=mine",
        "cluster.nodes=4",
    ]
    assert main([*line, "--cfg", "job"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["cluster"]["nodes"], values["cluster"]["tasks_per_node"], values["optim"]["lr"]) == (
        4,
        3,
        7.0e-4,
    )
    assert set(ClusterConfig.__dataclass_fields__) == set(values["cluster"])
    assert (
        main(["submit", "pipeline", "run.name=a b", "data.shards=/d/x.tar", "cluster=cpu", "--cfg", "job"])
        == 0
    )
    values = yaml.safe_load(capsys.readouterr().out)
    assert list(values) == ["autoencoder", "latents", "diffusion"]
    assert values["latents"]["first_stage"]["path"] == "runs/a b/autoencoder"
    assert values["diffusion"]["data"]["shards"] == "runs/a b/latents/*.tar"


@pytest.mark.parametrize("job", ["autoencoder", "pipeline", "JOB", ""])
def test_the_help_of_submit_lists_every_setting_of_a_cluster(job, capsys, folder):
    words = [word for word in ("submit", job, "--help", "--config-dir", str(folder)) if word]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}: " in shown for name in ClusterConfig.__dataclass_fields__)
    assert "clusters: cpu, gpu8, site" in shown


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--run.name=x"], "write run.name=x"),
        (["--run.name", "x"], "write run.name=VALUE"),
        (["run.name"], "write run.name=VALUE"),
        (["run.name", "=", "x"], "without spaces around ="),
        (["--hepl"], "did you mean --help"),
        (["--cfg"], "write --cfg job"),
        (["--cfg", "jobs"], "expected job, hydra or all"),
        (["--config-name", "x"], "--config-dir DIR"),
        (["--config-path=x"], "--config-dir DIR"),
        (["zero=4"], "choose one of 0, 1, 2, 3"),
        (["experiment=quickstart_autoencodr"], "did you mean quickstart_autoencoder"),
        (["experiment=quickstart_diffusion"], "ldmscale diffusion experiment=quickstart_diffusion"),
        (["unet=quickstart"], "unet is no setting of autoencoder (of diffusion"),
        (["optim=adamw,adam"], "add --multirun"),
        (["hydra.searchpath=[a]", "--config-dir", "/"], "as one list"),
    ],
)
def test_a_word_that_is_wrong_is_answered_with_the_right_one(words, remedy, capsys):
    assert main(["autoencoder", *words]) == 2
    said = capsys.readouterr().err
    assert remedy in said and "Traceback" not in said
    if words[0].startswith(("experiment=", "--", "run.name", "hydra")):
        assert "1 fault:" in said or words[:2] == ["run.name", "="] or words == ["run.name"]


@pytest.mark.parametrize("job", JOBS)
def test_no_job_takes_an_unknown_option(job):
    with pytest.raises(ConfigError, match="is no option"):
        parse(job, ["--unknown"])


def test_several_numbers_of_ranks_get_one_batch_that_suits_all(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [
        "submit",
        "autoencoder",
        "experiment=smoke",
        "cluster=cpu",
        "cluster.nodes=4",
        "cluster.min_nodes=2",
    ]
    line += ["cluster.tasks_per_node=4", "train.global_batch=48", "train.rank_micro_batch=2", "--dry-run"]
    assert main(line) == 2
    said = capsys.readouterr().err
    # 2 x lcm(8, 12, 16)
    assert "give train.global_batch=96, " in said and said.count("train.global_batch=48") == 1
    assert main([*line, "train.global_batch=96"]) == 0


def test_absent_shards_are_few_lines_behind_all_else(capsys, tmp_path):
    line = [
        "autoencoder",
        "experiment=smoke",
        f"data.shards={tmp_path}/{{000..099}}.tar",
        "train.global_batch=7",
    ]
    assert main([*line, "train.rank_micro_batch=2", "optim.lrr=3"]) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("  - ")]
    assert len(lines) < 12 and "optim.lrr" in lines[0] and "train.global_batch" in lines[1]
    assert "000.tar does not exist" in lines[2] and "94 more faults in data.shards" in lines[-1]
    assert main(["autoencoder", "experiment=smoke", f"data.shards={tmp_path}/a.tar,{tmp_path}/b.tar"]) == 2
    assert f"data.shards=[{tmp_path}/a.tar,{tmp_path}/b.tar]" in capsys.readouterr().err
