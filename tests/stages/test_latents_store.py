"""Latents in a real S3 server: the bytes of a folder's, whoever is killed or wakes up late, and each shard once."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import ObjectStore

sys.path.insert(0, str(Path(__file__).parent))
from latents_case import (
    FORMAT,
    SHARDS,
    contents,
    end_all,
    fill,
    joined,
    make,
    make_in_store,
    stall_in_store,
    started,
    write_images,
)

from ldmscale.data.latents.store import LatentStore
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.latents.writer import LatentShardWriter, finish_set, is_finished
from ldmscale.errors import DataError
from ldmscale.storage.object_store import Storage

SHARD = "00000.tar"


@pytest.fixture(autouse=True, scope="module")
def none_is_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def place(object_store: ObjectStore) -> LatentStore:
    """A new folder of the store."""
    url = object_store.bucket("latents") + f"/set-{time.time_ns()}"
    return LatentStore(url, Storage(object_store.options(), patience_seconds=60.0))


def objects(place: LatentStore) -> dict[str, bytes]:
    """Everything below the place, leases and drafts too."""
    return place.store.read_all(list(place.store.below("")))


def test_killed_processes_leave_the_set_of_a_folder_byte_for_byte(place: LatentStore, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    folder, told, storage = tmp_path / "set", tmp_path / "in_store", place.store.storage
    joined(started(make, images, folder, folder))
    ranks = [started(make_in_store, images, str(place), storage, told, clean=True) for _ in range(2)]
    draws, kills, deadline = random.Random(0), 0, time.monotonic() + 120
    while kills < 6 and any(rank.is_alive() for rank in ranks):
        while not place.store.entries() and time.monotonic() < deadline:  # they are at work
            time.sleep(0.02)
        time.sleep(draws.uniform(0, 0.4))
        victim = draws.randrange(2)
        ranks[victim].kill()
        ranks[victim].join(60)
        kills += ranks[victim].exitcode == -signal.SIGKILL
        ranks[victim] = started(make_in_store, images, str(place), storage, told, clean=True)
    joined(*ranks)
    assert kills > 0 and objects(place) == contents(folder)
    made = [path.read_text().count(" samples") for path in tmp_path.glob("in_store.*.log")]
    # One who died between the commit and the line about it has made a shard all the same.
    assert SHARDS - kills <= sum(made) <= SHARDS
    joined(
        started(make_in_store, images, str(place), storage, tmp_path / "again", clean=True)
    )  # finds all finished
    assert [path.read_text() for path in tmp_path.glob("again.*.log")] == [""]
    assert objects(place) == contents(folder)


def test_a_claim_without_a_sign_of_life_is_void_and_who_wakes_too_late_cannot_publish(
    place: LatentStore,
) -> None:
    late = started(stall_in_store, str(place), place.store.storage, clean=True)
    assert late.pid is not None
    deadline = time.monotonic() + 90
    while Path(f"/proc/{late.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it has not come to the place where it stops itself"
        time.sleep(0.01)
    claims = Claims(place, [SHARD], lambda n: is_finished(place, SHARD, FORMAT), timeout_seconds=3.0)
    assert claims.next(lambda n: None) is None  # it may still live
    while (claim := claims.next(lambda n: None)) is None:
        assert time.monotonic() < deadline, "the claim of a stopped process was not taken over"
        time.sleep(0.1)
    with LatentShardWriter(place, SHARD, FORMAT, None, claim.lease.check) as writer:
        fill(writer, 2.0)
    claim.lease.release()
    before = objects(place)
    os.kill(late.pid, signal.SIGCONT)
    late.join(60)
    assert late.exitcode == 7
    assert objects(place) == before and set(before) == {SHARD, "00000.json"}
    assert claims.all_finished()


def test_a_live_claim_is_not_taken_over_however_long_it_lasts(place: LatentStore) -> None:
    lost: list[int] = []
    mine = Claims(place, [SHARD], lambda n: False, timeout_seconds=6.0).next(lost.append)
    other = LatentStore(str(place), place.store.storage)
    others = Claims(other, [SHARD], lambda n: False, timeout_seconds=6.0)
    until = time.monotonic() + 10.0
    while time.monotonic() < until:
        assert others.next(lost.append) is None
        time.sleep(0.5)
    assert mine is not None and mine.lease.held() and lost == []
    mine.lease.release()
    time.sleep(1.1)  # a look at all leases serves for a second
    theirs = others.next(lost.append)
    assert theirs is not None and theirs.lease.held() and not mine.lease.held()
    theirs.lease.release()
    assert objects(place) == {}


def test_one_that_wakes_behind_its_last_check_cannot_publish_either(place: LatentStore) -> None:
    with LatentShardWriter(place, SHARD, FORMAT) as late:
        fill(late, 1.0)
        with LatentShardWriter(LatentStore(str(place), place.store.storage), SHARD, FORMAT) as fast:
            fill(fast, 2.0)
        before = objects(place)
    assert objects(place) == before and set(before) == {SHARD, "00000.json"}
    assert json.loads(before["00000.json"])["channel_sum"] == [2.0, 2.0]


def test_a_death_between_commit_and_copy_loses_nothing(place: LatentStore) -> None:
    with LatentShardWriter(place, SHARD, FORMAT) as writer:
        fill(writer, 1.0)
    before = objects(place)
    checksum = json.loads(before["00000.json"])["sha256"]
    place.store.write(f".{SHARD}.{checksum}.part", before[SHARD])
    place.store.remove(SHARD)
    place.store.write(f".{SHARD}.{'0' * 64}.part", b"of one who died before its commit")
    with pytest.raises(DataError, match="not finished"):  # the second was never made
        finish_set(place, [SHARD, "00001.tar"], FORMAT)
    assert finish_set(place, [SHARD], FORMAT).samples == 1
    of_set = {name: objects(place)[name] for name in ("manifest.json", "samples.idx")}
    assert objects(place) == before | of_set
    place.store.remove(SHARD)  # by hand: it is made again
    place.look_anew()
    assert not is_finished(place, SHARD, FORMAT)
    with LatentShardWriter(place, SHARD, FORMAT) as writer:
        fill(writer, 1.0)
    assert objects(place) == before | of_set


def test_a_large_shard_goes_up_in_parts(place: LatentStore, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 20) * 120)  # s3fs cuts at 50 MiB
    place.store.upload(large, "part")
    assert place.store.move("part", "whole") and not place.store.move("part", "whole")
    assert place.store.read("part") is None and place.store.read("whole") == large.read_bytes()
    place.store.remove("whole")
