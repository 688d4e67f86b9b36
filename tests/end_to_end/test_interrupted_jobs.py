"""Every job that a signal interrupts ends with 75 and says what the same command does, wherever the signal finds it.

pytorch-lightning#19916: an interrupted run ended with 0, and scripts went on as if it had finished.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml
from jobs import Host

from ldmscale.cli import JOB_SUMMARIES, RESUMES
from ldmscale.config import EvaluateJob
from ldmscale.config.compose import compose_job
from ldmscale.config.typed import plain, read

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def wait_for(what, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def opens_a_fifo(pid: int) -> bool:
    """Whether the process has its signal handlers and waits in open(2), where only a FIFO holds it for long."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        call = Path(f"/proc/{pid}/syscall").read_text().split(" ")[0]
    except (
        PermissionError
    ):  # the kernel keeps the call to itself: a process that sleeps is as good a sign as there is
        call = "257" if "State:\tS" in status else ""
    except OSError:
        return False
    return bool(caught >> (signal.SIGTERM - 1) & 1) and call in ("257", "56")  # openat on x86-64 and on arm64


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("job", JOB_SUMMARIES)
def test_an_interrupted_job_ends_with_75_and_names_what_comes_next(
    host: Host, tmp_path: Path, job: str, number: signal.Signals
) -> None:
    # The job stands where it reads its configuration from: no file that is there ever ends. `submit` takes no such file,
    # but it reads the run that a job is to read.
    run = tmp_path / "ae"
    (run / "checkpoints").mkdir(parents=True)
    os.mkfifo(run / "config.yaml")
    command = [job, "--frozen", str(run / "config.yaml")]
    if job == "submit":
        command = [
            job,
            "latents",
            f"first_stage.path={run}",
            "latents.path=lat",
            "data.shards=x.tar",
            "cluster=cpu",
        ]
    (rank,) = host.start(command, tmp_path / "keys", ranks=1)["ranks"]
    wait_for(lambda: opens_a_fifo(rank))
    os.kill(rank, number)
    assert host.ended() == 75, host.log
    assert f"{job} was interrupted by {number.name} (exit status 75): {RESUMES[job]}" in host.log
    assert "the same command" in RESUMES[job] and "Traceback" not in host.log


def test_ranks_that_wait_for_an_interrupted_one_end_too(host: Host, tmp_path: Path) -> None:
    """One rank has its configuration and waits in torch for the other one, which has not. pytorch#63802: such a wait heard no
    SIGINT, for ever.
    """
    config = read(EvaluateJob, compose_job("evaluate", ["evaluate.model=ae", "data.shards=x.tar"]))
    (tmp_path / "ae" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "ae" / "checkpoints" / "step_00000001" / "COMPLETE").touch()
    (tmp_path / "ae" / "config.yaml").write_text("{job: autoencoder, data: {image_size: 32}}")
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    fifo = tmp_path / "frozen.yaml"
    os.mkfifo(fifo)
    ranks = host.start(["evaluate", "--frozen", str(fifo)], tmp_path / "keys", ranks=2)["ranks"]
    wait_for(lambda: all(opens_a_fifo(rank) for rank in ranks))
    os.kill(ranks[1], signal.SIGSTOP)
    fifo.write_text(yaml.safe_dump(plain(config)))
    wait_for(lambda: any("gloo" in name or "pt_tcpstore" in name for name in threads(ranks[0])))
    began = time.monotonic()
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    os.kill(ranks[1], signal.SIGCONT)
    assert host.ended() == 75, host.log
    assert time.monotonic() - began < 20 and "Traceback" not in host.log


def threads(pid: int) -> list[str]:
    return [(task / "comm").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.parametrize("job", ["index", "doctor", "latents"])
def test_a_job_that_waits_for_a_store_ends_at_once(host: Host, tmp_path: Path, job: str) -> None:
    """The server accepts the request and never answers."""
    (tmp_path / "ae" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "ae" / "checkpoints" / "step_00000001" / "COMPLETE").touch()
    (tmp_path / "ae" / "config.yaml").write_text("{job: autoencoder, data: {image_size: 32}}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        words = {
            "index": [f"data.shards={url}"],
            "doctor": [f"doctor.shards={url}", "doctor.measure_mib=1"],
            "latents": [f"data.shards={url}", "first_stage.path=ae", "latents.path=lat"],
        }
        (rank,) = host.start([job, *words[job]], tmp_path / "keys", ranks=1)["ranks"]
        server.settimeout(60)
        connection, _ = server.accept()
        began = time.monotonic()
        os.kill(rank, signal.SIGTERM)
        assert host.ended() == 75, host.log
        assert time.monotonic() - began < 8, host.log
        connection.close()
    assert RESUMES[job] in host.log and "Traceback" not in host.log
