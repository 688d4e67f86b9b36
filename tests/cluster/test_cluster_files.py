"""What the cluster files of real sites ask for: rendered job scripts, run with a program that records in the place of srun."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldmscale import cli
from ldmscale.cluster.slurm import render
from ldmscale.cluster.submission import Frozen
from ldmscale.config import ClusterConfig
from ldmscale.config.checks.cluster import check_cluster, python_hint, seconds, time_as_text
from ldmscale.jobs import submit

# Appends its arguments and environment to a file, and ends as $ENDS says; the program of a node runs for each node.
SRUN = f"""#!{sys.executable}
import json, os, subprocess, sys
words = sys.argv[1:]
with open(os.environ["SEEN"], "a") as seen:
    seen.write(json.dumps([words, dict(os.environ)]) + "\\n")
if "-c" in words:  # of cluster.node_setup: bash -eo pipefail -c LINES
    sys.exit(subprocess.run(words[words.index("bash"):]).returncode)
sys.exit(int(os.environ.get("ENDS", "0")))
"""
SCONTROL = '#!/usr/bin/env bash\necho "$*" >>"$SEEN.scontrol"\n[[ $* != requeue* ]] || { echo "Access denied"; exit 1; }\n'


class Script:
    """The rendered script of a cluster's configuration, in a folder of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.cluster = ClusterConfig(**{"nodes": 1, "tasks_per_node": 1, **settings})
        assert check_cluster(self.cluster) == []
        self.folder, self.seen = folder, folder / "seen"
        self.frozen = Frozen(folder / "run" / "submissions" / "0001")
        self.frozen.code.mkdir(parents=True)
        self.text = render(self.frozen, "diffusion", "name", folder / "run", folder, self.cluster)
        self.frozen.script.write_text(self.text)
        programs = folder / "programs"
        programs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/sh\n")):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        own = {
            "PATH": self.path,
            "SEEN": str(self.seen),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-3]",
        }
        return subprocess.run(
            ["bash", str(self.frozen.script)], cwd=self.folder, env=os.environ | own | env, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    @property
    def steps(self) -> list[tuple[list[str], dict[str, str]]]:
        """Words and environment of each srun so far."""
        lines = self.seen.read_text().splitlines() if self.seen.exists() else []
        return [tuple(json.loads(line)) for line in lines]


@pytest.mark.parametrize("line", ["module load no/such/module", "false", "cat no_such_file | wc -l"])
def test_a_line_of_setup_that_fails_ends_the_job_with_its_message(tmp_path: Path, line: str) -> None:
    script = Script(tmp_path, setup=("module() { false; }", line, "touch after"))
    done = script.run()
    assert done.returncode == 1 and not script.steps and not (tmp_path / "after").exists()
    assert done.stderr.splitlines()[-1] == f"ldmscale: cluster.setup failed with status 1: {line}"


def test_setup_may_read_variables_that_are_not_set_as_scripts_of_conda_do(tmp_path: Path) -> None:
    script = Script(tmp_path, setup=('export FOUND="<$NOT_SET_ANYWHERE>"',))
    assert script.run().returncode == 0
    assert script.steps[0][1]["FOUND"] == "<>"


def test_node_setup_runs_once_on_each_node_before_the_ranks_and_a_failure_starts_none(tmp_path: Path) -> None:
    script = Script(
        tmp_path,
        node_setup=("mkdir scratch_$SLURM_JOB_ID", "touch scratch_17/'a b'"),
        max_failures_without_progress=0,
    )
    assert script.run(SLURM_JOB_NUM_NODES="3").returncode == 0
    (setup, _), (ranks, _) = script.steps
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1"} <= set(setup) and "diffusion" in ranks
    assert (tmp_path / "scratch_17" / "a b").exists()
    done = script.run()  # the folder is there already: mkdir fails
    assert (
        done.returncode == 1
        and "cluster.node_setup failed with status 1" in done.stdout
        and len(script.steps) == 3
    )


def test_a_node_setup_cannot_pose_as_the_end_of_the_run(tmp_path: Path) -> None:
    script = Script(tmp_path, node_setup=("exit 75",), max_failures_without_progress=0)
    assert script.run().returncode == 1


CONTAINER = (
    "--container-image=nvcr.io#nvidia/pytorch:25.01",
    "--container-mounts=/data:/data,/a b:/c",
    "--mpi=$(touch PWNED)",
)


def test_options_of_srun_and_words_of_python_arrive_as_they_are(tmp_path: Path) -> None:
    """submitit#1779: containers of pyxis are options of srun."""
    words = ("apptainer", "exec", "--nv", "--bind", "/a b:/c;touch PWNED", "image 'x'.sif", "python3")
    script = Script(tmp_path, srun_options=CONTAINER, python=words, options=("--export=NONE",))
    assert script.run(SLURM_CPUS_PER_TASK="6").returncode == 0
    ((got, _),) = script.steps
    # snakemake-executor-plugin-slurm#41: from 22.05 on srun does not take it from the job
    assert "--cpus-per-task=6" in got
    start = [*words, str(script.frozen.code / "start.py"), "diffusion", "--frozen", str(script.frozen.config)]
    assert got[-len(start) :] == start
    assert got[-len(start) - 3 : -len(start)] == list(CONTAINER)
    assert (
        "--export=ALL" in got
    )  # else the ranks of a job with `#SBATCH --export=NONE` would have no environment
    assert "#SBATCH --export=NONE" in script.text and not list(tmp_path.rglob("PWNED"))


def test_variables_in_the_environment_are_expanded_where_the_job_starts(tmp_path: Path) -> None:
    values = {
        "SCRATCH": '/scratch/$SLURM_JOB_ID/it\'s a "folder"',
        "LDMSCALE_CACHE": "${SCRATCH}/cache",  # of one above
        "PRICE": "5$$ $$HOME $(touch PWNED) `touch PWNED` $1 ${x:-y} $",
        "EMPTY": "",
    }
    script = Script(tmp_path, environment=values)
    assert script.run().returncode == 0
    found = script.steps[0][1]
    assert found["SCRATCH"] == '/scratch/17/it\'s a "folder"'
    assert found["LDMSCALE_CACHE"] == found["SCRATCH"] + "/cache"
    assert found["PRICE"] == "5$ $HOME $(touch PWNED) `touch PWNED` $1 ${x:-y} $" and found["EMPTY"] == ""
    assert not list(tmp_path.rglob("PWNED"))


def test_a_variable_that_is_not_set_ends_the_job_and_is_named(tmp_path: Path) -> None:
    script = Script(tmp_path, environment={"CACHE": "/scratch/$NOT_SET_ANYWHERE/x"})
    done = script.run()
    assert done.returncode != 0 and not script.steps
    assert "NOT_SET_ANYWHERE: is not set, and cluster.environment.CACHE is made of it" in done.stderr


def test_ranks_left_over_in_the_shell_that_submits_do_not_reach_the_job(tmp_path: Path) -> None:
    script = Script(tmp_path, setup=("export MASTER_PORT=29999",))
    left_over = dict.fromkeys(
        ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"], "1"
    )
    assert script.run(**left_over).returncode == 0
    found = {name: script.steps[0][1].get(name) for name in left_over}
    assert found == dict.fromkeys(left_over) | {"MASTER_PORT": "29999"}  # what setup sets stays


def test_where_requeue_is_forbidden_the_next_link_goes_on_and_those_after_the_last_do_nothing(
    tmp_path: Path,
) -> None:
    script = Script(tmp_path, requeue=False)
    assert "#SBATCH --no-requeue" in script.text and "#SBATCH --requeue" not in script.text
    done = script.run(ENDS="75")
    assert done.returncode == 75 and "the next job of this name goes on" in done.stdout
    assert script.run(ENDS="0").returncode == 0 and len(script.steps) == 2
    done = script.run(ENDS="9")
    assert done.returncode == 0 and "nothing is left to do" in done.stdout and len(script.steps) == 2
    assert "requeue" not in Path(f"{script.seen}.scontrol").read_text()


@pytest.mark.parametrize(("ends", "failures", "status"), [("2", 5, 2), ("7", 0, 7)])
def test_a_chain_without_requeue_ends_whole_with_what_cannot_work(
    tmp_path: Path, ends: str, failures: int, status: int
) -> None:
    script = Script(tmp_path, requeue=False, max_failures_without_progress=failures)
    assert script.run(ENDS=ends).returncode == status
    assert script.run(ENDS="0").returncode == status and len(script.steps) == 1


def test_a_requeue_that_the_site_refuses_is_told_with_its_remedy(tmp_path: Path) -> None:
    done = Script(tmp_path).run(ENDS="75")
    assert done.returncode == 75
    assert "scontrol requeue: Access denied" in done.stdout and "cluster.requeue=false" in done.stdout


@pytest.mark.parametrize(("asked", "count"), [("a100:4", 4), ("nvidia_h100_80gb_hbm3:8", 8), (2, 2), (0, 0)])
def test_gpus_may_have_a_type(tmp_path: Path, asked: int | str, count: int) -> None:
    script = Script(tmp_path, gpus_per_node=asked, tasks_per_node=max(count, 1))
    assert script.cluster.gpus == count
    assert (f"#SBATCH --gpus-per-node={asked}\n" in script.text) is (count > 0)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"gpus_per_node": "a100"}, r"gpus_per_node='a100': expected a number, or a type and a number such as a100:4"),
        ({"gpus_per_node": -1}, r"gpus_per_node=-1"),
        ({"gpus_per_node": "a100:4", "tasks_per_node": 8}, r"give cluster.tasks_per_node=4"),
        ({"python": "apptainer exec --nv img.sif python"}, r"cluster.python=\[apptainer, exec, --nv, img.sif, python\]"),
        ({"python": ()}, r"begins with no program"),
        ({"python": ("-c", "x")}, r"begins with no program"),
        ({"srun_options": ("--container-image=x",)}, r"give the interpreter inside the container"),
        ({"environment": {"A": "/scratch/$SLURM_NODEID"}}, r"\$SLURM_NODEID differs between nodes"),
        ({"environment": {"A": "${HOSTNAME}"}}, r"\$HOSTNAME differs"),
        # NVIDIA/pyxis#167, az-hop#1023: sbatch does not know it, or starts the script in the container
        ({"options": ("--container-image=x",)}, r"give it in cluster.srun_options"),
        ({"requeue": False, "array": 4}, r"cluster.requeue=false with cluster.array=4"),
        ({"srun_options": ("--a\nb",)}, r"cluster.srun_options: '--a\\nb'"),
        ({"python": ("python\x1b",)}, r"cluster.python: 'python\\x1b'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_remedy(settings: Mapping[str, Any], fault: str) -> None:
    (found,) = check_cluster(ClusterConfig(**{"nodes": 1, "tasks_per_node": 1, **settings}))
    assert re.search(fault, found), found


def test_an_interpreter_that_is_not_here_gives_a_hint(tmp_path: Path) -> None:
    def hint(**settings: Any) -> str | None:
        return python_hint(ClusterConfig(nodes=1, tasks_per_node=1, **settings))

    assert hint() is hint(python=sys.executable) is hint(python=("bash", "x")) is None
    assert "/no/such/python is not on this machine" in str(hint(python="/no/such/python"))
    assert "apptainer_of_elsewhere is not" in str(hint(python=("apptainer_of_elsewhere", "exec")))
    assert hint(python="/in/the/container", srun_options=("--container-image=x",)) is None


EVERYTHING = {
    "gpus_per_node": "a100:4", "setup": ("module load cuda", "conda activate ldm"), "srun_options": CONTAINER,
    "node_setup": ("mkdir -p /scratch/$SLURM_JOB_ID",), "python": ("apptainer", "exec", "a b.sif", "python3"),
    "environment": {"A": "/scratch/$SLURM_JOB_ID", "B": "5$$", "C": ""}, "requeue": False, "array": None,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"array": 4}, EVERYTHING, {**EVERYTHING, "requeue": True}])
def test_shellcheck_finds_nothing_in_a_rendered_script(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck is not installed; `make install` does so")
    done = subprocess.run(
        [str(program), "-x", str(Script(tmp_path, **settings).frozen.script)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# What `time: ...` of a file means to sbatch; None: refused, since YAML 1.1 reads a number (4:00:00 is 4*3600).
TIMES = {
    '"4:00:00"': 4 * 3600, "'04:00:00'": 4 * 3600, "04:00:00": None, "4:00:00": None, "1:30:00": None, "59:59": None,
    "1-12:00:00": 129_600, '"1-12:00:00"': 129_600, "2-0": 172_800, "7-00": 604_800, '"240"': 14_400, "240": None, "1.5": None,
    "0:30": None, '"0:30"': 30, "90:00:00": None, '"90:00:00"': 324_000,
}  # fmt: skip


@pytest.mark.parametrize("written", TIMES)
def test_a_time_in_a_file_means_what_is_written_or_is_refused(tmp_path: Path, written: str) -> None:
    """newcomer's A2: `time: 4:00:00` became 14400 minutes, ten days."""
    (tmp_path / "site.yaml").write_text(f"time: {written}\n")
    value = OmegaConf.to_container(OmegaConf.load(tmp_path / "site.yaml"))["time"]
    faults = time_as_text({"cluster": {"time": value}}, False)
    if isinstance(value, str):
        expected = TIMES[written] or seconds(
            written
        )  # 04:00:00 is text to YAML 1.1: a number has no zero in front
        assert faults == [] and seconds(value) == expected
    else:
        assert TIMES[written] is None and len(faults) == 1 and 'time: "' in faults[0]


def test_a_refused_time_names_what_was_probably_meant() -> None:
    (fault,) = time_as_text({"cluster": {"time": 14_400}}, False)
    assert fault.endswith('for 4:00:00 write time: "4:00:00", for 14400 minutes time: "14400"')


@pytest.mark.parametrize(("written", "status"), [("4:00:00", 2), ('"4:00:00"', 0)])
def test_submit_reads_the_time_of_a_file_of_ones_own_as_written_or_refuses_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "cluster").mkdir(parents=True)
    (tmp_path / "own" / "cluster" / "mine.yaml").write_text(f"nodes: 1\ntasks_per_node: 1\ntime: {written}\n")
    words = [
        "submit",
        "diffusion",
        "--config-dir",
        str(tmp_path / "own"),
        "experiment=smoke",
        "cluster=mine",
        "--dry-run",
    ]
    assert cli.main(words) == status
    if status:
        assert 'for 4:00:00 write time: "4:00:00"' in capsys.readouterr().err
    else:
        (script,) = tmp_path.rglob("job.sbatch")
        assert "#SBATCH --time=4:00:00\n" in script.read_text()


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("2:30:00", "2:30:00"),
        ("240", "240"),
        ("1-12:00:00", "1-12:00:00"),
        ("'4:00:00'", "4:00:00"),
        ("12:34", "12:34"),
    ],
)
def test_a_time_on_the_command_line_reaches_sbatch_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        submit.main(["diffusion", "experiment=smoke", "cluster=cpu", f"cluster.time={word}", "--dry-run"])
        == 0
    )
    (script,) = tmp_path.rglob("job.sbatch")
    assert f"#SBATCH --time={shown}\n" in script.read_text()


CHAIN = [
    "pipeline",
    "cluster=cpu",
    "run.name=whole",
    "autoencoder:experiment=smoke",
    "diffusion:experiment=smoke",
]
CHAIN += ["autoencoder:data=shards", "diffusion:data=latents", "latents:data=shards", "data.image_size=32"]


def test_a_dry_run_of_the_pipeline_shows_names_and_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        assert submit.main([*CHAIN, f"data.shards={tmp_path}/a.tar", "--dry-run"]) == 0
    places = [tmp_path / "runs/whole" / part for part in ("autoencoder", "latents", "")]
    scripts = [place / "submissions/0001/job.sbatch" for place in places]
    for script, job in zip(scripts, ("autoencoder", "latents", "diffusion"), strict=True):
        assert f"#SBATCH --job-name=whole-{job}\n" in script.read_text()
    assert caplog.messages[-1].splitlines()[1:] == [
        f"autoencoder=$(sbatch --parsable {scripts[0]})",
        f"latents=$(sbatch --parsable --dependency=afterok:$autoencoder --kill-on-invalid-dep=yes {scripts[1]})",
        f"diffusion=$(sbatch --parsable --dependency=afterok:$latents --kill-on-invalid-dep=yes {scripts[2]})",
    ]


def test_a_chain_of_links_is_queued_by_one_name_that_no_other_run_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        words = ["diffusion", "experiment=smoke", "cluster=cpu", "cluster.requeue=false", "cluster.links=3"]
        with caplog.at_level(logging.INFO):
            assert submit.main([*words, "run.name=same", "--dry-run"]) == 0
        (script,) = (tmp_path / place).rglob("job.sbatch")
        names += re.findall(r"^#SBATCH --job-name=(.*)$", script.read_text(), re.M)
        assert caplog.messages[-1].splitlines()[1] == (
            f"for link in {{1..3}}; do diffusion=$(sbatch --parsable --dependency=singleton {script}); done"
        )
    assert len(set(names)) == 2 and all(name.startswith("same-diffusion-") for name in names)
