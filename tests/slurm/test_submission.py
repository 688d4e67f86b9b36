"""`ldmscale submit` on a real cluster: preempted, requeued, robbed of a node, and still the same run."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_cluster import Cluster, until

CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]


def submit(cluster: Cluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = cluster.environment | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ldmscale", "submit", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def records(run: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(run.glob("submissions/*/submission.json"))]


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/total"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def output(run: Path) -> str:
    return "".join(file.read_text() for file in sorted((run / "logs").glob("slurm_*.out")))


def reached(run: Path, step: int, number: str, cluster: Cluster) -> None:
    def there() -> bool:
        assert cluster.state(number) not in ("FAILED", "COMPLETED", "CANCELLED"), output(run)
        return max(steps(run), default=0) >= step and cluster.state(number) == "RUNNING"

    until(there, 240, f"step {step}")


def test_a_run_survives_preemption_requeue_and_the_loss_of_a_node_on_fewer_nodes(cluster, tmp_path):
    # How many steps pass meanwhile depends on the machine; so small ones that rounding cannot grow.
    job = ["diffusion", "experiment=smoke", "train.global_batch=12", "checkpoint.save_every_steps=4", "run.name=run",
           "optim.curve=constant", "optim.lr=1e-6"]  # fmt: skip
    endless = "train.max_steps=100000"
    done = submit(cluster, tmp_path, *job, endless, "cluster=cpu", "cluster.nodes=3", "cluster.min_nodes=1",
                  "cluster.time=30", "cluster.partition=main", 'cluster.options=["--exclusive"]')  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    number = records(run)[0]["slurm_job"]

    reached(run, 5, number, cluster)
    # A second submission of the same run is refused while the first is there.
    again = submit(cluster, tmp_path, *job, endless, "cluster=cpu", "cluster.nodes=3")
    assert again.returncode == 2 and f"Slurm job {number}" in again.stderr
    # Preempted: USR1 to the batch shell, a complete save, and back into the queue, without the node found bad.
    (run / "bad_nodes.txt").write_text("node1\n")
    urgent = cluster.ask(
        "sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    cluster.wait(urgent, ["COMPLETED"], 240)
    assert "stopped after a complete save" in output(run)
    before = max(steps(run))
    reached(run, before + 3, number, cluster)
    assert cluster.job(number)["ExcNodeList"] == "node1"
    assert (
        "node1" not in cluster.ask("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()
    )
    cluster.ask("scontrol", "requeue", number)  # TERM to all, at once
    before = max(steps(run))
    reached(run, before + 3, number, cluster)
    # A node dies with all that runs on it; Slurm takes a while to notice, then the job starts on what is left.
    lost = cluster.ask("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()[-1]
    cluster.node("kill", int(lost.removeprefix("node")))
    before = max(steps(run))
    reached(run, before + 2, number, cluster)
    cluster.node("start", int(lost.removeprefix("node")))
    # Stopped for good, and taken to its end by another job.
    cluster.ask("scancel", number)
    cluster.wait(number, ["CANCELLED"], 90)
    last = max(steps(run)) + 2
    done = submit(cluster, tmp_path, *job, f"train.max_steps={last}", "cluster=cpu", "cluster.nodes=1")
    assert done.returncode == 0, done.stderr
    state = cluster.wait(records(run)[-1]["slurm_job"], ["COMPLETED", "FAILED", "CANCELLED"], 240)
    assert state == "COMPLETED", output(run)

    assert steps(run) == list(range(1, last + 1))  # each step once, in order
    identity = json.loads((run / "run.json").read_text())
    assert identity["finished_step"] == last and identity["attempts"] >= 5
    # The undisturbed run, on one rank, has the same losses.
    straight = subprocess.run(
        [sys.executable, "-m", "ldmscale", *job, "run.name=straight", f"train.max_steps={last}"],
        cwd=tmp_path, timeout=400, check=False,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert straight.returncode == 0, straight.stderr
    np.testing.assert_allclose(losses(run), losses(tmp_path / "runs" / "straight"), rtol=1e-5)


def test_a_chain_of_the_three_stages_ends_with_a_model_and_one_that_cannot_begin_ends_whole(
    cluster, tmp_path
):
    _write_shards(tmp_path / "data")
    size = ["data.image_size=32", f"data.shards={tmp_path}/data/*.tar"]
    tiny = ["autoencoder:experiment=smoke", "diffusion:experiment=smoke", "autoencoder:train.max_steps=3",
            "diffusion:train.max_steps=3", "autoencoder:data=shards", "diffusion:data=latents", "latents:data=shards"]  # fmt: skip
    wanted = ["pipeline", "cluster=cpu", "run.name=whole", *size, *tiny]
    done = submit(cluster, tmp_path, *wanted, "cluster.no_such=1", "latents:data.image_size=x")
    assert done.returncode == 2 and "no_such" in done.stderr and "image_size='x'" in done.stderr
    assert not (tmp_path / "runs").exists()  # nothing is left behind by a refused one

    done = submit(cluster, tmp_path, *wanted)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "runs" / "whole"
    chain = [records(folder)[0]["slurm_job"] for folder in (whole / "autoencoder", whole / "latents", whole)]

    # Meanwhile: a chain whose shards are gone when its first job starts.
    cluster.ask("scontrol", "update", "partition=urgent", "state=down")
    _write_shards(tmp_path / "other")
    words = [
        word.replace(f"{tmp_path}/data", f"{tmp_path}/other")
        for word in wanted
        if not word.startswith("run.")
    ]
    done = submit(cluster, tmp_path, *words, "run.name=broken", "cluster.partition=urgent")
    assert done.returncode == 0, done.stderr
    for shard in (tmp_path / "other").iterdir():
        shard.unlink()
    cluster.ask("scontrol", "update", "partition=urgent", "state=up")
    broken = tmp_path / "runs" / "broken"
    first, *rest = [
        records(folder)[0]["slurm_job"] for folder in (broken / "autoencoder", broken / "latents", broken)
    ]
    assert cluster.wait(first, ["FAILED", "COMPLETED"], 90) == "FAILED"
    assert cluster.job(first)["ExitCode"] == "2:0" and cluster.job(first).get("Restarts", "0") == "0"
    for number in rest:
        assert cluster.wait(number, ["CANCELLED"], 60)
    assert "data.shards" in output(broken / "autoencoder")

    assert cluster.wait(chain[-1], ["COMPLETED", "FAILED", "CANCELLED"], 240) == "COMPLETED", output(whole)
    assert json.loads((whole / "run.json").read_text())["finished_step"] == 3
    assert len(list((whole / "latents").glob("*.tar"))) == 2
    # Manifests name the revision of the code that was frozen.
    manifest = json.loads(
        (
            whole / "checkpoints" / (whole / "checkpoints" / "latest").read_text().strip() / "manifest.json"
        ).read_text()
    )
    assert manifest["state"]["run"]["git_revision"] == records(whole)[0]["git_revision"]

    # The same latents once more, by an array of jobs that know nothing of each other.
    again = tmp_path / "again"
    words = [
        "latents",
        "data=shards",
        *size,
        f"first_stage.path={whole}/autoencoder",
        f"latents.path={again}",
    ]
    done = submit(cluster, tmp_path, *words, "cluster=cpu", "cluster.nodes=1", "cluster.array=3")
    assert done.returncode == 0, done.stderr
    number = records(again)[0]["slurm_job"]
    assert f"slurm_{number}_*.out" in done.stderr
    second = submit(cluster, tmp_path, *words, "cluster=cpu", "cluster.nodes=1", "cluster.array=3")
    assert second.returncode == 2 and f"Slurm job {number}" in second.stderr
    for task in range(3):
        state = cluster.wait(f"{number}_{task}", ["COMPLETED", "FAILED", "CANCELLED"], 240)
        assert state == "COMPLETED", output(again)
        assert "finished" in (again / "logs" / f"slurm_{number}_{task}.out").read_text()
    made, expected = (
        {path.name: path.read_bytes() for path in folder.glob("*.tar")}
        for folder in (again, whole / "latents")
    )
    assert made == expected and output(again).count("shard 0000") == len(made)


def test_a_job_near_its_time_limit_saves_and_goes_on(cluster, tmp_path):
    done = submit(cluster, tmp_path, "diffusion", "experiment=smoke", "run.name=limited", "train.max_steps=100000",
                  "cluster=cpu", "cluster.nodes=1", "cluster.time=1", "cluster.stop_before_end_seconds=30",
                  "cluster.max_requeues=9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "limited"
    number = records(run)[0]["slurm_job"]
    until(lambda: "stopped after a complete save" in output(run), 150, "the stop before the limit")
    before = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    reached(run, before + 2, number, cluster)
    cluster.ask("scancel", number)
    cluster.wait(number, ["CANCELLED", "PENDING"], 90)
    cluster.ask("scancel", number, check=False)  # where the end of its time came first
    assert steps(run)[: before + 2] == list(range(1, before + 3))


def _write_shards(folder: Path) -> None:
    folder.mkdir()
    draws = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(16):
                image = io.BytesIO()
                Image.fromarray(draws.integers(0, 255, (40, 40, 3), np.uint8)).save(image, "png")
                for name, data in (("png", image.getvalue()), ("txt", b"noise")):
                    member = tarfile.TarInfo(f"{shard}_{number}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
