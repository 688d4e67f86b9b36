"""Copies of checkpoints in a real S3 store: whole or not at all, through kills, refusals and cut connections."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_proxy import FaultProxy
from object_store import ObjectStore
from processes import running

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.remote import RemoteCheckpoints
from ldmscale.checkpoint.shards import Piece, Reader
from ldmscale.errors import CheckpointError
from ldmscale.storage.lease import LeaseLostError
from ldmscale.storage.object_store import Storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bucket(
    object_store: ObjectStore, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An empty bucket, reached through the proxy."""
    import fsspec

    fault_proxy.only = "^(PUT|POST) "
    for name, value in object_store.behind(fault_proxy.endpoint).environment().items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # those of other tests know other endpoints
    yield object_store.bucket(f"checkpoints-{time.time_ns()}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def pieces(step: int) -> list[Piece]:
    values = torch.full((1 << 16,), float(step))
    return [Piece("denoiser/master/w", (values.numel(),), 0, values)]


def value(folder: Path | None) -> float:
    assert folder is not None
    out = torch.zeros(1)
    Reader(folder).fill("denoiser/master/w", 5, out)
    return out.item()


def test_refusals_and_cut_connections_are_tried_again_or_told_and_never_leave_half_a_checkpoint(
    bucket: str,
    object_store: ObjectStore,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, store = tmp_path / "run" / "checkpoints", object_store.filesystem()
    run.mkdir(parents=True)
    (run.parent / "metrics.jsonl").write_text('{"step": 1}\n')
    manager = CheckpointManager(run, url=f"{bucket}/run", beside=("metrics.jsonl", "tokenizer"))
    fault_proxy.plan = ["503", "reset", "503"]
    manager.save(1, pieces(1), {})
    manager.finish(uploads=True)
    assert fault_proxy.injected == 3 and "is not in" not in caplog.text
    assert store.cat(f"{bucket}/run/beside/metrics.jsonl") == b'{"step": 1}\n'
    # The manifest is the last object of a checkpoint.
    written = [request.split("?")[0].rpartition("/")[2] for request in fault_proxy.requests]
    assert written[-1] == "manifest.json" and "manifest.json" not in written[:-1]
    # A store that refuses every manifest: the run goes on, the copy of before counts, the next start makes up for it.
    fault_proxy.calm()
    fault_proxy.only, fault_proxy.always = "^(PUT|POST) .*manifest", "403"
    manager.save(2, pieces(2), {})
    manager.finish(uploads=True)
    assert f"step 2 is not in {bucket}/run, only in {run}" in caplog.text and manager.failed_saves == 0
    elsewhere = CheckpointManager(tmp_path / "elsewhere", url=f"{bucket}/run")
    assert value(elsewhere.newest()) == 1.0
    fault_proxy.calm()
    again = CheckpointManager(run, url=f"{bucket}/run")
    assert value(again.newest()) == 2.0
    again.finish(uploads=True)
    # The folder is gone, and downloads stumble too.
    shutil.rmtree(run.parent)
    fault_proxy.only, fault_proxy.plan = "^GET .*safetensors", ["503", "reset", "short"]
    back = CheckpointManager(run, url=f"{bucket}/run")
    assert value(back.newest()) == 2.0 and fault_proxy.injected == 3


def test_an_upload_that_is_killed_does_not_count_and_the_next_start_makes_it_whole(
    bucket: str, object_store: ObjectStore, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url, store = f"{bucket}/run", object_store.filesystem()
    program = [sys.executable, str(Path(__file__).with_name("program_upload.py")), str(tmp_path / "run"), url]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*program, "1", "1"], env=environment, check=True, timeout=120)
    # Killed while it sends its tensors, and while it sends what makes them count.
    for step, stuck in ((2, "^(PUT|POST) .*safetensors"), (3, "^(PUT|POST) .*manifest")):
        fault_proxy.calm()
        fault_proxy.only, fault_proxy.plan = stuck, ["stall"]
        with running([*program, str(step), "1"], env=environment) as process:
            deadline = time.monotonic() + 120
            while not fault_proxy.injected and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None and fault_proxy.injected
        assert not store.exists(f"{url}/step_{step:08d}/manifest.json")
        assert value(CheckpointManager(tmp_path / f"elsewhere_{step}", url=url).newest()) == 1.0
    assert store.exists(f"{url}/step_00000003/rank_00000.safetensors")  # half of it is there
    fault_proxy.calm()
    again = CheckpointManager(tmp_path / "run", url=url)
    assert value(again.newest()) == 3.0
    again.finish(uploads=True)
    assert value(CheckpointManager(tmp_path / "whole", url=url).newest()) == 3.0


def test_a_start_that_wakes_up_uploads_nothing_over_a_later_one(bucket: str, tmp_path: Path) -> None:
    for url in (f"{bucket}/run", f"file://{tmp_path}/store"):
        kind = url.partition(":")[0]
        first = CheckpointManager(tmp_path / kind / "first" / "checkpoints", url=url)
        assert first.newest() is None
        first.save(1, pieces(1), {})
        first.finish(uploads=True)
        # Given up for dead: the run goes on elsewhere, where no lease of the first folder is seen.
        second = CheckpointManager(tmp_path / kind / "second" / "checkpoints", url=url)
        assert value(second.newest()) == 1.0
        second.save(2, pieces(2), {})
        second.finish(uploads=True)
        # It wakes up, between two saves and in the middle of an upload.
        first.save(2, pieces(7), {})
        with pytest.raises(CheckpointError, match=r"claimed by a later start .*second.* must not share"):
            first.finish(uploads=True)
        assert first.remote is not None
        with pytest.raises(LeaseLostError):
            first.remote.check_claim()
        second.save(3, pieces(3), {})
        second.finish(uploads=True)
        assert value(CheckpointManager(tmp_path / kind / "third" / "checkpoints", url=url).newest()) == 3.0
        assert value(_fetched(tmp_path / kind, url, 2)) == 2.0


def _fetched(folder: Path, url: str, step: int) -> Path:
    """A checkpoint as it lies in the store."""
    remote, target = RemoteCheckpoints(url), folder / f"step_{step:08d}"
    target.mkdir()
    remote.get_small(step, target)
    for file in remote.manifest(step).files:
        remote.get(step, file.name, file.size, target)
    return target


def test_of_many_starts_that_claim_a_url_at_once_one_is_the_latest(bucket: str, tmp_path: Path) -> None:
    for url in (f"{bucket}/many", f"file://{tmp_path}/many"):
        starts = [RemoteCheckpoints(url) for _ in range(6)]
        threads = [threading.Thread(target=start.claim, args=("run",), daemon=True) for start in starts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        lost = 0
        for start in starts:
            try:
                start.check_claim()
            except LeaseLostError:
                lost += 1
        assert lost == 5


def test_the_settings_of_data_storage_reach_the_url_and_its_time_limits_and_retries_hold(
    object_store: ObjectStore,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in object_store.environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # no credentials from the machine
    url, run = object_store.bucket(f"settings-{time.time_ns()}") + "/run", tmp_path / "run"
    options = object_store.options()
    del options["client_kwargs"]["endpoint_url"]
    storage = Storage(options, fault_proxy.endpoint, patience_seconds=60.0, request_seconds=1.0)
    manager = CheckpointManager(run / "checkpoints", url=url, storage=storage)
    # A request that hangs for longer than its time limit, and more refusals in a row than the client's library retries.
    fault_proxy.stall_seconds = 15.0
    fault_proxy.only, fault_proxy.plan = "^(PUT|POST) .*safetensors", ["stall", *["503"] * 12]
    manager.save(1, pieces(1), {})
    manager.finish(uploads=True)
    assert fault_proxy.injected == 13 and "trying again" in caplog.text and "is not in" not in caplog.text
    fault_proxy.calm()
    fault_proxy.only, fault_proxy.plan = "^GET .*safetensors", ["stall", "503", "short"]
    elsewhere = CheckpointManager(tmp_path / "elsewhere", url=url, storage=storage)
    assert value(elsewhere.newest()) == 1.0 and fault_proxy.injected == 3
    # Patience ends, and the run goes on.
    fault_proxy.calm()
    fault_proxy.only, fault_proxy.always = "^(PUT|POST) .*safetensors", "503"
    impatient = replace(storage, patience_seconds=1.0)
    manager = CheckpointManager(run / "checkpoints", url=url, storage=impatient)
    manager.save(2, pieces(2), {})
    manager.finish(uploads=True)
    assert f"step 2 is not in {url}, only in {run / 'checkpoints'}" in caplog.text
    assert "data.storage.patience_seconds" in caplog.text


@pytest.mark.distributed
def test_no_rank_sends_files_before_the_manifest_of_the_same_step_is_gone(
    bucket: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    fault_proxy.only = "^(DELETE|PUT|POST) .*(manifest|safetensors)"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [
        str(Path(__file__).with_name("program_upload.py")),
        str(tmp_path / "run"),
        f"{bucket}/run",
        "1,1",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *program], env=environment, check=True, timeout=240)
    done = [
        (request.split()[0], request.split("?")[0].rpartition("/")[2]) for request in fault_proxy.requests
    ]
    files = [("PUT", f"rank_0000{rank}.safetensors") for rank in (0, 1)]
    assert sorted(done[:2]) == sorted(done[4:6]) == files
    assert done[2:4] == [("PUT", "manifest.json"), ("DELETE", "manifest.json")]
    assert done[6:] == [("PUT", "manifest.json")]
