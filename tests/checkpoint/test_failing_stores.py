"""A full disk, a read-only target, a store that is gone: older checkpoints stay good, and somebody is told."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.shards import Piece, Reader
from ldmscale.errors import CheckpointError


def filled(step: int, megabytes: int = 1) -> list[Piece]:
    values = torch.full((megabytes << 18,), float(step))
    return [Piece("denoiser/master/w", (values.numel(),), 0, values)]


def first(folder: Path | None) -> float:
    assert folder is not None
    out = torch.zeros(1)
    Reader(folder).fill("denoiser/master/w", 0, out)
    return out.item()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    if done.returncode:
        pytest.skip(f"a small disk can be made by root only: {done.stderr.strip()}")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=False, timeout=240)
    subprocess.run(["umount", str(folder)], check=True, timeout=240)


def test_a_full_disk_is_told_the_run_goes_on_and_the_next_save_may_hold(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(small_disk / "checkpoints", max_failed_saves=2)
    manager.save(1, filled(1), {})
    manager.save(2, filled(2), {})
    manager.begin(3, filled(3, megabytes=8), {})
    manager.finish()
    assert "No space left on device" in caplog.text and "older ones are as they were" in caplog.text
    assert first(manager.newest()) == 2.0
    assert not list(small_disk.glob("**/*.tmp"))
    manager.save(4, filled(4), {})
    assert first(manager.newest()) == 4.0 and manager.failed_saves == 0


def test_more_failures_in_a_row_than_allowed_stop_the_run_with_one_message(small_disk: Path) -> None:
    manager = CheckpointManager(small_disk / "checkpoints", max_failed_saves=1)
    manager.save(1, filled(1), {})
    manager.begin(2, filled(2, megabytes=8), {})
    manager.finish()
    manager.begin(3, filled(3, megabytes=8), {})
    with pytest.raises(CheckpointError, match=r"step 3 .*No space left(.|\n)*2 saves have failed in a row"):
        manager.finish()
    assert first(manager.newest()) == 1.0


def test_every_way_to_run_out_of_space_leaves_the_older_checkpoint(small_disk: Path) -> None:
    """The disk ends after each of many numbers of bytes: in the data, the header, the manifest, COMPLETE, latest."""
    manager = CheckpointManager(small_disk / "checkpoints")
    manager.save(1, filled(1), {})
    ballast = small_disk / "ballast"
    failed = 0
    for pages in range(0, 40, 3):  # free pages beyond what the data need
        ballast.unlink(missing_ok=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(b"0" * max(0, free - (1 << 20) - 4096 * pages))
        fresh = CheckpointManager(small_disk / "checkpoints")
        try:
            fresh.save(2, filled(2), {})
        except CheckpointError:
            failed += 1
            assert first(fresh.newest()) == 1.0
        else:
            assert first(fresh.newest()) == 2.0
            break
    assert failed > 0
    assert first(fresh.newest()) == 2.0


def test_a_read_only_target_is_one_error_and_the_older_checkpoint_stays(small_disk: Path) -> None:
    manager = CheckpointManager(small_disk / "checkpoints", max_failed_saves=1)
    manager.save(1, filled(1), {})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=240)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        manager.save(2, filled(2), {})
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True, timeout=240)
    assert first(manager.newest()) == 1.0


def test_a_store_that_is_gone_is_told_and_the_disk_has_every_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    manager = CheckpointManager(tmp_path / "run", url=f"file://{store}")
    manager.save(1, filled(1), {})
    manager.finish(uploads=True)
    assert (store / "step_00000001" / "manifest.json").is_file()
    shutil.rmtree(store)
    store.write_text("no folder any more")
    manager.save(2, filled(2), {})
    manager.finish(uploads=True)
    assert f"step 2 is not in file://{store}, only in {tmp_path / 'run'}" in caplog.text
    assert first(manager.newest()) == 2.0 and manager.failed_saves == 0
    store.unlink()
    again = CheckpointManager(tmp_path / "run", url=f"file://{store}")
    assert first(again.newest()) == 2.0
    again.finish(uploads=True)  # made up for at the next start
    assert (store / "step_00000002" / "manifest.json").is_file()


def test_without_its_folder_a_run_goes_on_from_the_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path / 'store'}"
    manager = CheckpointManager(tmp_path / "run", url=url)
    for step in (1, 2, 3):
        manager.save(step, filled(step), {"step": step})
        manager.finish(uploads=True)
    assert sorted(path.name for path in (tmp_path / "store").glob("step_*")) == [
        "step_00000002",
        "step_00000003",
    ]
    shutil.rmtree(tmp_path / "run")
    # An upload that was cut off has no manifest, and does not count.
    (tmp_path / "store" / "step_00000009").mkdir()
    (tmp_path / "store" / "step_00000009" / "rank_00000.safetensors").write_bytes(b"half")
    elsewhere = CheckpointManager(tmp_path / "elsewhere", url=url)
    assert first(elsewhere.newest()) == 3.0
    # One that is damaged on the disk comes from the store too; one that is damaged there is passed over.
    for place in ("store", "elsewhere"):
        path = tmp_path / place / "step_00000003" / "rank_00000.safetensors"
        os.truncate(path, path.stat().st_size - 5)
    with caplog.at_level(logging.WARNING):
        assert first(elsewhere.newest()) == 2.0
    assert "step_00000003 cannot be used" in caplog.text


def test_a_save_is_what_it_was_at_its_beginning_and_the_training_goes_on_meanwhile(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    pieces = filled(1, megabytes=64)
    manager.begin(1, pieces, {})
    assert threading.active_count() > 1
    assert manager.busy[0] and not (tmp_path / "latest").exists()
    manager.finish(must_hold=True)
    assert manager.busy == (False, False) and first(manager.newest()) == 1.0
