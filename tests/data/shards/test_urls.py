"""Patterns become lists of shards, or one error with every fault."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from ldmscale.data.shards.urls import expand, local_path, run_pipes, shard_states
from ldmscale.errors import DataError
from ldmscale.storage.object_store import ShardState


@pytest.fixture
def five(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / f"{number:05d}.tar").write_bytes(bytes(1024))
    return tmp_path


def test_braces_globs_lists_and_folders_expand_in_order(five: Path) -> None:
    every = [str(five / f"{number:05d}.tar") for number in range(5)]
    assert expand(f"{five}/{{00000..00004}}.tar") == every
    assert expand(f"{five}/*.tar") == every
    assert expand(str(five)) == every
    assert expand([f"{five}/{{00003,00001}}.tar", f"{five}/00000.tar"]) == [every[3], every[1], every[0]]
    assert expand(f"file://{five}/00002.tar") == [every[2]]


def test_every_fault_is_named_at_once(five: Path) -> None:
    with pytest.raises(DataError) as caught:
        expand([f"{five}/{{00003..00006}}.tar", f"{five}/0000[3].tar", f"{five}/x*.tar", "pipe:cat x.tar"])
    text = str(caught.value)
    assert len(caught.value.faults) == 5
    assert "00005.tar does not exist" in text and "00006.tar does not exist" in text
    assert "matches no file" in text and "named twice" in text and "data.allow_pipe=true" in text


def test_nothing_given_is_a_fault() -> None:
    for nothing in ("", [], [" "]):
        with pytest.raises(DataError, match="names no shard"):
            expand(nothing)


def test_remote_urls_are_kept_and_remote_globs_expanded() -> None:
    assert expand("s3://bucket/{00..02}.tar") == [f"s3://bucket/0{number}.tar" for number in range(3)]
    store = fsspec.filesystem("memory")
    for name in ("b", "a"):
        store.pipe_file(f"/expand/{name}.tar", b"x")
    assert expand("memory://expand/*.tar") == ["memory:///expand/a.tar", "memory:///expand/b.tar"]


def test_an_allowed_pipe_is_run_once_by_all_processes_and_not_by_looking(five: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    url = f"pipe:echo ran >> {log}; sleep 0.3; cat {five}/00001.tar"
    assert expand(url, allow_pipe=True) == [url] and not log.exists()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run_pipes, [[url]] * 4))
    assert Path(local_path(url)).read_bytes() == bytes(1024) and log.read_text() == "ran\n"
    assert isinstance(shard_states([url])[0], ShardState)


def test_a_pipe_that_fails_anywhere_gives_nothing(five: Path) -> None:
    late, early = "pipe:head -c 100 /dev/zero; exit 3", "pipe:(head -c 100 /dev/zero; exit 4) | cat"
    with pytest.raises(DataError) as caught:
        run_pipes([late, early])
    assert "status 3" in caught.value.faults[0] and "status 4" in caught.value.faults[1]
    assert not Path(local_path(late)).exists() and not Path(local_path(early)).exists()


def test_states_tell_versions_apart_and_say_what_is_missing(five: Path) -> None:
    path = five / "00000.tar"
    (before,) = shard_states([str(path)])
    path.write_bytes(bytes(2048))
    after, missing = shard_states([str(path), str(five / "no.tar")])
    assert isinstance(before, ShardState) and isinstance(after, ShardState) and before != after
    assert missing == "No such file or directory"
    fsspec.filesystem("memory").pipe_file("/states/a.tar", b"12345")
    present, gone = shard_states(["memory://states/a.tar", "memory://states/b.tar"])
    assert isinstance(present, ShardState) and present.size == 5 and "no such object" in str(gone)
