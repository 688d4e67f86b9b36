"""Mixtures: exact proportions, an epoch for each set, one sequence for any number of ranks and any batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmscale.data import ShardStream, WeightedShards
from ldmscale.data.order.sequence import CYCLE, Sequence, _Turns
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture
from ldmscale.errors import DataError

WriteShards = Callable[..., list[str]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> list[ShardIndex]:
    return [
        ShardIndex.open(write_shards(tmp_path_factory.mktemp(name), counts), build_missing=True)
        for name, counts in (("large", [30, 20, 25]), ("small", [3, 4]))
    ]


def test_sets_have_their_proportion_and_each_its_own_epochs(parts: list[ShardIndex]) -> None:
    sequence = Sequence(Mixture(parts, [3.0, 1.0]), seed=2, block_shards=2)
    places = [sequence.place(0, number) for number in range(CYCLE)]
    of_set = [[p for p in places if p.shard < 3], [p for p in places if p.shard >= 3]]
    assert [len(found) for found in of_set] == [7500, 2500]
    for found, size in zip(of_set, (75, 7), strict=True):
        for start in range(0, len(found) - size, size):
            assert len(set(found[start : start + size])) == size
    # Any thousand in a row is close to the proportion, too.
    shares = [sum(p.shard < 3 for p in places[start : start + 1000]) for start in range(0, CYCLE, 1000)]
    assert min(shares) > 690 and max(shares) < 810


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.integers(0, 3 * CYCLE), min_size=1, max_size=30), seed=st.integers(0, 3))
def test_any_number_can_be_asked_first(parts: list[ShardIndex], numbers: list[int], seed: int) -> None:
    mixture = Mixture(parts, [0.9, 0.1])
    straight = Sequence(mixture, seed)
    wanted = {number: straight.place(0, number) for number in sorted(numbers)}
    fresh = Sequence(mixture, seed)
    assert {number: fresh.place(0, number) for number in numbers} == wanted


@settings(max_examples=80, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_shares_add_up_and_hold_over_many_cycles(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    turns = _Turns(shares)
    for cycle in (0, 1, 2, 1000):
        assert turns.before(cycle).sum() == cycle * CYCLE
        assert (turns.before(cycle + 1) >= turns.before(cycle)).all()
    assert np.abs(turns.before(1000) / 1000 - shares * CYCLE).max() <= len(weights)


def test_a_rare_set_comes_as_often_as_its_weight_states() -> None:
    """At 1/50,000 it has one turn in five cycles, not one in each."""
    turns = _Turns(np.array([0.99998, 0.00002]))
    assert [int(turns.before(cycle)[1]) for cycle in (0, 1, 4, 5, 10, 1000)] == [0, 0, 0, 1, 2, 200]
    assert turns.before(1000)[0] == 1000 * CYCLE - 200


def test_shares_of_a_ten_thousandth_and_more_keep_their_order() -> None:
    """Runs of before resume: whole turns per cycle, the largest rests rounded up."""
    assert (_Turns(np.array([0.75, 0.25])).before(3) == [22500, 7500]).all()
    assert (_Turns(np.array([1 / 3, 2 / 3])).before(1) == [3333, 6667]).all()


def test_worlds_and_batches_do_not_change_the_sequence(parts: list[ShardIndex]) -> None:
    mixture = Mixture(parts, [0.5, 0.5])

    def keys(world: int, batch: int, steps: int, position: int = 0) -> list[str]:
        streams = [
            iter(ShardStream(mixture, seed=1, rank=rank, world=world, global_batch=batch, position=position))
            for rank in range(world)
        ]
        return [
            f"{index}{key}"
            for _ in range(steps)
            for index, stream in enumerate(streams)
            for key, _ in itertools.islice(stream, batch // world)
        ]

    def bare(found: list[str]) -> list[str]:
        return [key[1:] for key in found]

    straight = bare(keys(1, 1, 60))
    legs = [*keys(2, 6, 2), *keys(1, 4, 3, 12), *keys(3, 9, 2, 24), *keys(4, 4, 4, 42), *keys(1, 2, 1, 58)]
    assert bare(legs) == straight


def test_shards_with_weights_open_as_a_stream(tmp_path: Path, write_shards: WriteShards) -> None:
    write_shards(tmp_path / "a", [9])
    write_shards(tmp_path / "b", [9])
    sets = [WeightedShards(str(tmp_path / "a"), 1.0), WeightedShards([f"{tmp_path}/b/*.tar"], 3.0)]
    stream = ShardStream(sets, seed=0, rank=0, world=1, global_batch=4)
    assert len(stream.index.shards) == 2
    assert Counter(key for key, _ in itertools.islice(stream, 20)).total() == 20


def test_faults_of_all_sets_are_told_and_weights_are_for_all_or_none(
    tmp_path: Path, parts: list[ShardIndex]
) -> None:
    with pytest.raises(DataError) as caught:
        Mixture.open([WeightedShards(str(tmp_path / "no.tar")), WeightedShards(str(tmp_path / "nor.tar"))])
    assert len(caught.value.faults) == 2
    assert Mixture(parts).weights == pytest.approx([75 / 82, 7 / 82])
    for weights in ([1.0, None], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(DataError, match="weight"):
            Mixture(parts, weights)
    assert Mixture(parts, [1, 1]).fingerprint != Mixture(parts, [1, 2]).fingerprint
    assert Mixture(parts[:1]).fingerprint == parts[0].fingerprint
