"""What `submit` checks and freezes, without a queue. The queue itself is in tests/slurm."""

import json
import os
import subprocess
import sys

import yaml

from ldmscale.checkpoint.run_folder import git_revision
from ldmscale.cluster.chain import stages_of
from ldmscale.config import ClusterConfig
from ldmscale.config.checks.cluster import seconds

SMOKE = ["diffusion", "experiment=smoke", "cluster=cpu"]


def test_a_submission_holds_all_that_the_job_reads(ldmscale, tmp_path):
    done = ldmscale("submit", *SMOKE, "cluster.setup=[module load cuda]", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frozen = tmp_path / "runs" / "smoke_diffusion" / "submissions" / "0001"
    script = (frozen / "job.sbatch").read_text()
    assert (
        subprocess.run(["bash", "-n", str(frozen / "job.sbatch")], check=False, timeout=240).returncode == 0
    )
    assert (
        f"LDMSCALE_FROZEN={frozen}" in script
        and "module load cuda" in script
        and "#SBATCH --nodes=2" in script
    )
    record = json.loads((frozen / "submission.json").read_text())
    assert record["packages"]["torch"] and len(record["code_sha256"]) == 64 and "slurm_job" not in record
    # Checkpoints of the frozen code name the revision that was frozen, though it is no checkout.
    code = "from ldmscale.checkpoint.run_folder import git_revision; print(git_revision())"
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=frozen / "code", env=os.environ | {"PYTHONPATH": str(frozen / "code")},
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert asked.stdout.strip() == str(record["git_revision"]) == str(git_revision())
    # The frozen code runs the frozen configuration, though another ldmscale stands where it is started.
    (tmp_path / "ldmscale").mkdir()
    (tmp_path / "ldmscale" / "__init__.py").write_text("raise SystemExit('the wrong code')")
    values = yaml.safe_load((frozen / "config.yaml").read_text())
    values["train"]["global_batch"] = 7
    values["unet"]["heads"] = None
    (frozen / "config.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        str(frozen / "code" / "start.py"),
        "diffusion",
        "--frozen",
        str(frozen / "config.yaml"),
    ]

    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 2 and "train.global_batch=7" in ran.stderr and "unet.heads" in ran.stderr, (
        ran.stderr
    )


def test_all_faults_are_told_for_every_number_of_nodes_and_nothing_is_written(ldmscale, tmp_path):
    done = ldmscale(
        "submit",
        *SMOKE,
        "cluster.nodes=3",
        "cluster.min_nodes=1",
        "cluster.time=soon",
        "optim.lr=much",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    for fault in (
        "cluster.time='soon'",
        "optim.lr='much'",
        "may start with (1, 2, 3): give train.global_batch=12,",
    ):
        assert fault in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
    for words, fault in (
        (["sampel"], "expected pipeline or one of"),
        (["diffusion", "experiment=smoke"], "cluster is not set"),
        (["diffusion", "experiment=smoke", "cluster=cpu", "cluster.array=2"], "cluster.array=2"),
        (["pipeline", "cluster=cpu"], "run.name is not set"),
    ):
        done = ldmscale("submit", *words, cwd=tmp_path)
        assert done.returncode == 2 and fault in done.stderr, done.stderr


def test_stages_of_a_chain_get_their_own_words_and_each_other_s_folders():
    stages, faults = stages_of(
        [
            "cluster=cpu",
            "run.name=x",
            "seed=3",
            "data.shards=a.tar",
            "latents:cluster.nodes=4",
            "no.key=1",
            "sample:a=b",
        ]
    )
    assert [stage.job for stage in stages] == ["autoencoder", "latents", "diffusion"]
    words = {stage.job: stage.overrides for stage in stages}
    assert all("cluster=cpu" in own for own in words.values())
    assert "cluster.nodes=4" in words["latents"] and "cluster.nodes=4" not in words["diffusion"]
    assert (
        "data.shards=a.tar" in words["latents"] and "data.shards=runs/x/latents/*.tar" in words["diffusion"]
    )
    assert (
        "run.dir=runs/x/autoencoder" in words["autoencoder"]
        and "first_stage.path=runs/x/autoencoder" in words["latents"]
    )
    assert [fault.split(":")[0] for fault in faults] == ["sample", "no.key=1"]


def test_durations_are_read_as_sbatch_reads_them():
    assert [seconds(text) for text in ("5", "5:30", "1:00:00", "2-0", "1-2:30")] == [
        300,
        330,
        3600,
        172800,
        95400,
    ]


def test_a_job_may_start_on_fewer_nodes():
    assert ClusterConfig(nodes=4, min_nodes=2, tasks_per_node=8).world_sizes == [16, 24, 32]
