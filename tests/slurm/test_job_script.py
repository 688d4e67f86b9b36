"""What slurm/job.sbatch does about each end of its ranks, on a real cluster; in the place of ldmscale stands a short program."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from real_cluster import Cluster, until

from ldmscale.cluster.slurm import dependency, render
from ldmscale.cluster.submission import Frozen
from ldmscale.config import ClusterConfig

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# Ends as the first word of its plan says, taking that word away: a number at once, "stop" with 75 once it hears TERM or USR1,
# "late" with 75 once it hears TERM: its save takes longer than it has from USR1 on.
RANK = """
import os, pathlib, signal, sys, time
plan = pathlib.Path(__file__).with_name("plan" + os.environ.get("SLURM_ARRAY_TASK_ID", ""))
first, *rest = plan.read_text().split()
plan.write_text(" ".join(rest))
if first not in ("stop", "late"):
    print("begun:", first, flush=True)
    sys.exit(int(first))
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: sys.exit(75))
if first == "late":
    signal.signal(signal.SIGUSR1, lambda *_: print("saving", flush=True))
print("begun:", first, flush=True)
for _ in range(6000):
    time.sleep(0.1)
"""


class Job:
    """The rendered script of a frozen folder, in the queue."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *plans: str,
        program: str = RANK,
        links: int = 1,
        **facts: object,
    ) -> None:
        """`plans`: one, or one for each task of an array. `links`: so many jobs of one name are queued."""
        self.cluster, self.folder = cluster, folder
        frozen = Frozen(folder / "submissions" / "0001")
        frozen.code.mkdir(parents=True)
        (folder / "logs").mkdir()
        (frozen.code / "start.py").write_text(program)
        for task, plan in enumerate(plans):
            (frozen.code / (f"plan{task}" if len(plans) > 1 else "plan")).write_text(plan)
        facts |= {"array": len(plans)} if len(plans) > 1 else {}
        facts = {"nodes": 1, "tasks_per_node": 1, "time": "60", "python": sys.executable, **facts}
        asked = ClusterConfig(**facts)  # type: ignore[arg-type]
        frozen.script.write_text(render(frozen, "diffusion", "trial", folder / "logs", folder, asked))
        options = dependency(singleton=links > 1)
        self.numbers = [
            cluster.ask("sbatch", "--parsable", *options, str(frozen.script)) for _ in range(links)
        ]
        self.number = self.numbers[-1]

    @property
    def output(self) -> str:
        return "".join(file.read_text() for file in sorted((self.folder / "logs").glob("slurm_*.out")))

    def says(self, text: str, times: int = 1) -> None:
        until(lambda: self.output.count(text) >= times, 150, f"{text!r} in: {self.output}")

    def ends(self, state: str, status: str, restarts: int) -> None:
        """And stays so."""
        assert self.cluster.wait(self.number, ["COMPLETED", "FAILED", "CANCELLED"], 150) == state, self.output
        time.sleep(4.0)
        found = self.cluster.job(self.number)
        assert (found["JobState"], found["ExitCode"], found["Restarts"]) == (state, status, str(restarts)), (
            self.output
        )


def test_a_job_that_was_stopped_comes_back_and_one_that_was_cancelled_does_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "stop stop stop")
    job.says("begun: stop")
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm does before the time limit
    job.says("stopped after a complete save")
    job.says("begun: stop", 2)
    cluster.ask("scontrol", "requeue", job.number)
    job.says("begun: stop", 3)
    cluster.ask("scancel", job.number)  # the ranks end with 75 here too
    until(lambda: cluster.state(job.number) == "CANCELLED", 150, job.output)
    time.sleep(4.0)
    assert cluster.state(job.number) == "CANCELLED" and cluster.job(job.number)["Restarts"] == "2", job.output


def test_a_job_that_is_cancelled_after_the_warning_stays_so(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "late stop")
    job.says("begun: late")
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    job.says("saving")
    cluster.ask("scancel", job.number)
    job.says("cancelled: not queued again")
    job.ends("CANCELLED", "75:0", restarts=0)


def test_a_task_of_an_array_that_was_stopped_comes_back_alone(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "stop stop", "stop stop")
    job.says("begun: stop", 2)
    # The task that has the number of the whole array as its own.
    (task,) = (task for task in "01" if cluster.job(f"{job.number}_{task}")["JobId"] == job.number)
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{job.number}_{task}")
    job.says("begun: stop", 3)
    restarts = {other: cluster.job(f"{job.number}_{other}")["Restarts"] for other in "01"}
    states = {cluster.state(f"{job.number}_{other}") for other in "01"}
    cluster.ask("scancel", job.number)
    for other in "01":
        cluster.wait(f"{job.number}_{other}", ["CANCELLED"], 150)
    assert restarts[task] == "1" and sorted(restarts.values()) == ["0", "1"] and states == {"RUNNING"}, (
        job.output
    )


def test_failures_are_tried_again_as_long_as_there_is_progress_and_what_cannot_work_is_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "fails", "7 7 7 0", max_failures_without_progress=1)
    faulty = Job(cluster, tmp_path / "faulty", "2 0")
    whole = Job(cluster, tmp_path / "whole", "9 0")
    job.ends("FAILED", "7:0", restarts=1)
    assert "giving up; ldmscale doctor" in job.output and job.output.count("begun: 7") == 2
    faulty.ends("FAILED", "2:0", restarts=0)
    whole.ends("COMPLETED", "0:0", restarts=1)


def test_without_requeue_the_jobs_of_one_name_follow_each_other_and_the_last_has_nothing_to_do(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "75 0 9", links=3, requeue=False)
    job.ends("COMPLETED", "0:0", restarts=0)
    first, second, _ = (cluster.job(number) for number in job.numbers)
    assert (first["JobState"], first["ExitCode"]) == ("FAILED", "75:0")
    assert (second["JobState"], second["ExitCode"]) == ("COMPLETED", "0:0")
    assert first["EndTime"] <= second["StartTime"]
    assert "begun: 0" in job.output and "begun: 9" not in job.output and "nothing is left to do" in job.output


def test_each_node_is_set_up_once_before_its_ranks_which_get_the_environment_whatever_sbatch_exports(
    cluster: Cluster, tmp_path: Path
) -> None:
    program = "import os; print('rank', os.environ['SLURM_PROCID'], os.environ['PLACE'], os.environ['SLURM_CPU_BIND'])"
    job = Job(
        cluster, tmp_path, program=program, nodes=2, options=("--export=NONE",), srun_options=("--cpu-bind=none",),
        environment={"PLACE": f"{tmp_path}/$SLURM_JOB_ID"}, node_setup=('mkdir -p "$PLACE"', 'touch "$PLACE/$SLURMD_NODENAME"'),
    )  # fmt: skip
    job.ends("COMPLETED", "0:0", restarts=0)
    for rank in (0, 1):
        assert f"rank {rank} {tmp_path}/{job.number} quiet,none" in job.output
    nodes = cluster.ask("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()
    assert (
        sorted(file.name for file in (tmp_path / job.number).iterdir()) == sorted(nodes) and len(nodes) == 2
    )


def test_a_folder_with_a_hostile_name_runs_nothing_and_gets_its_output(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "%j it's $(touch PWNED); `touch PWNED` #SBATCH --wrap=x %%x \"ä"
    job = Job(cluster, folder, "0")
    job.ends("COMPLETED", "0:0", restarts=0)
    assert "begun: 0" in (folder / "logs" / f"slurm_{job.number}.out").read_text()
    assert not list(tmp_path.rglob("PWNED")) and list(tmp_path.iterdir()) == [folder]
