"""One global sequence: any world, any resume, bad samples replaced alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmscale.data import ShardStream
from ldmscale.data.loading.skipped_samples import Ledger, read_ledger
from ldmscale.data.shards.index import ShardIndex
from ldmscale.errors import ConfigError, DataError

WriteShards = Callable[..., list[str]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> ShardIndex:
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("set"), [7, 1, 12, 0, 5]), build_missing=True)


def keys(index: ShardIndex, world: int, batch: int, steps: int, position: int = 0) -> list[str]:
    """Keys of so many global batches, in rank order."""
    streams = [
        iter(
            ShardStream(
                index, seed=3, rank=rank, world=world, global_batch=batch, position=position, block_shards=2
            )
        )
        for rank in range(world)
    ]
    return [
        key for _ in range(steps) for stream in streams for key, _ in itertools.islice(stream, batch // world)
    ]


def test_each_epoch_has_every_sample_once(index: ShardIndex) -> None:
    sequence = keys(index, 1, 5, 15)  # three epochs of 25
    epochs = [sequence[start : start + 25] for start in (0, 25, 50)]
    assert all(len(set(epoch)) == 25 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_global_batches_are_the_same_for_any_world(index: ShardIndex, world: int) -> None:
    assert keys(index, world, 12, 6) == keys(index, 1, 12, 6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5)
)
def test_resumes_with_other_worlds_and_batches_repeat_and_skip_nothing(
    index: ShardIndex, legs: list[tuple[int, int, int]]
) -> None:
    position = 0
    sequence: list[str] = []
    for world, part, steps in legs:
        sequence += keys(index, world, world * part, steps, position)
        position += world * part * steps
    assert sequence == keys(index, 1, 1, position)


def test_position_counts_the_samples_of_all_ranks(index: ShardIndex) -> None:
    stream = ShardStream(index, seed=3, rank=1, world=2, global_batch=6, position=4)
    seen = []
    for _ in itertools.islice(stream, 6):
        seen.append(stream.position)
    assert seen == [4, 4, 10, 10, 10, 16]


def test_a_pattern_is_enough_and_samples_are_bytes(tmp_path: Path, write_shards: WriteShards) -> None:
    write_shards(tmp_path, [2, 2])
    key, sample = next(
        iter(ShardStream(f"{tmp_path}/{{00000..00001}}.tar", seed=0, rank=0, world=1, global_batch=1))
    )
    assert sample["txt"] == f"caption {key}".encode() and set(sample) == {"png", "txt", "json"}


def test_unreadable_samples_are_replaced_and_written_down(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = write_shards(tmp_path, [6, 6])
    index = ShardIndex.open(shards, build_missing=True)
    offset, _ = index.span(0, 2)
    with open(shards[0], "r+b") as stream:  # damage of the disk: the size stays
        stream.seek(offset)
        stream.write(b"\xff" * 100)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    got = [
        key
        for key, _ in itertools.islice(
            ShardStream(index, seed=0, rank=0, world=1, global_batch=4, ledger=ledger), 24
        )
    ]
    assert "0000002" not in got and len(got) == 24
    entries = read_ledger(tmp_path / "ledger.jsonl")
    assert [entry["shard"] for entry in entries] == [shards[0]] * len(entries) and len(entries) >= 2
    assert all("no sense any more" in entry["reason"] and entry["key"] == "number 2" for entry in entries)


def test_a_set_that_vanished_stops_the_stream(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = write_shards(tmp_path, [3])
    stream = ShardStream(shards, seed=0, rank=0, world=1, global_batch=1)
    Path(shards[0]).unlink()
    with pytest.raises(DataError, match="16 stand-ins"):
        next(iter(stream))


def test_batches_that_cannot_be_shared_are_refused(index: ShardIndex) -> None:
    with pytest.raises(ConfigError, match="multiple of 3"):
        ShardStream(index, seed=0, rank=0, world=3, global_batch=4)
    with pytest.raises(ConfigError, match="rank 2 of 2") as caught:
        ShardStream(index, seed=0, rank=2, world=2, global_batch=4, position=-1)
    assert len(caught.value.faults) == 2
