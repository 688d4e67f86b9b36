"""The order is a pure function that covers every epoch exactly once."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmscale.data.order.shuffle import Order
from ldmscale.errors import ConfigError, DataError

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@settings(max_examples=80, deadline=None)
@given(counts=COUNTS, seed=st.integers(-5, 2**63), block=st.integers(1, 14))
def test_each_epoch_has_every_sample_exactly_once(counts: list[int], seed: int, block: int) -> None:
    order = Order(counts, seed, block)
    every = sorted((shard, index) for shard, count in enumerate(counts) for index in range(count))
    for epoch in range(3):
        found = [
            order.sample_at(position) for position in range(epoch * order.total, (epoch + 1) * order.total)
        ]
        assert {got[0] for got in found} == {epoch}
        assert sorted(got[1:] for got in found) == every


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 9), block=st.integers(1, 14), data=st.data())
def test_any_position_can_be_asked_first(
    counts: list[int], seed: int, block: int, data: st.DataObject
) -> None:
    straight = Order(counts, seed, block)
    sequence = [straight.sample_at(position) for position in range(4 * straight.total)]
    fresh = Order(counts, seed, block)
    for position in data.draw(st.lists(st.integers(0, len(sequence) - 1), max_size=20)):
        assert fresh.sample_at(position) == sequence[position]


def test_reads_stay_inside_a_block_of_shards() -> None:
    order = Order([10] * 20, seed=1, block_shards=4)
    for block in range(5):
        assert len({order.sample_at(position)[1] for position in range(block * 40, block * 40 + 40)}) == 4


def test_epochs_and_seeds_differ_and_blocks_are_mixed() -> None:
    orders = [Order([50, 50], seed, block_shards=2) for seed in (0, 1)]
    sequences = [
        [order.sample_at(epoch * 100 + i)[1:] for i in range(100)] for order in orders for epoch in (0, 1)
    ]
    assert len({tuple(sequence) for sequence in sequences}) == 4
    for sequence in sequences:
        # Neighbours in the shards are far apart in the order: 33 on average for a perfect shuffle of 100.
        place = {sample: number for number, sample in enumerate(sequence)}
        steps = [abs(place[shard, i] - place[shard, i + 1]) for shard in (0, 1) for i in range(49)]
        assert 25 < np.mean(steps) < 42


def test_every_block_of_every_epoch_is_shuffled_anew() -> None:
    order = Order([30, 30, 30], seed=0, block_shards=1)
    shuffles = [
        tuple(order.sample_at(position)[2] for position in range(start, start + 30))
        for start in range(0, 4 * 90, 30)
    ]
    assert len(set(shuffles)) == 12


def test_locate_numbers_all_samples() -> None:
    order = Order([0, 2, 0, 3, 0], seed=0)
    assert [order.locate(number) for number in range(5)] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]


def test_a_position_deep_in_laion_is_found_at_once() -> None:
    began = time.perf_counter()
    order = Order(np.full(41_455, 10_000), seed=0)
    epoch, shard, index = order.sample_at(int(0.9 * order.total))
    assert time.perf_counter() - began < 10.0  # 0.05 s on a 2-core machine
    assert epoch == 0 and 0 <= shard < 41_455 and 0 <= index < 10_000


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(DataError, match="no sample"):
        Order([0, 0], seed=0)
    with pytest.raises(ConfigError, match="shuffle_block_shards"):
        Order([1], seed=0, block_shards=0)
    with pytest.raises(ValueError, match="at least 0"):
        Order([1], seed=0).sample_at(-1)


@pytest.mark.parametrize("block", [4, 16])
def test_the_shuffle_is_as_good_as_the_docs_say(block: int) -> None:
    shards, samples = 64, 100
    order = Order([samples] * shards, seed=3, block_shards=block)
    sequence = [order.sample_at(position)[1:] for position in range(order.total)]
    same = np.mean([a[0] == b[0] for a, b in itertools.pairwise(sequence)])
    assert same == pytest.approx(1 / block, abs=0.015)
    place = {sample: position for position, sample in enumerate(sequence)}
    apart = [abs(place[s, i] - place[s, i + 1]) for s in range(shards) for i in range(samples - 1)]
    assert np.mean(apart) == pytest.approx(block * samples / 3, rel=0.05)


@pytest.mark.parametrize(("shards", "alone"), [(16, 4), (17, 1), (18, 2), (20, 4)])
def test_the_last_block_of_an_epoch_holds_the_shards_that_are_left(shards: int, alone: int) -> None:
    """A documented choice (docs/numerics.md): one shard alone where the block leaves a rest of one."""
    order = Order([5] * shards, seed=3, block_shards=4)
    last = [order.sample_at(position)[1] for position in range(order.total - 5 * alone, order.total)]
    before = {order.sample_at(position)[1] for position in range(order.total - 5 * alone)}
    assert len(set(last)) == alone and not before & set(last)
