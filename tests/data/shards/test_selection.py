"""Filters and buckets are settled in the index: the order is an order over what is taken, exact as ever."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmscale.data.images.buckets import BucketCursor, bucket_of, bucket_shapes
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.report import check_shards
from ldmscale.data.shards.selection import Selection
from ldmscale.errors import ConfigError, DataError

WriteTar = Callable[..., str]
MakeImage = Callable[..., bytes]

SIZES = [(40, 40), (64, 32), (32, 64), (40, 38)]  # of image n: SIZES[n % 4]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_image: MakeImage, write_tar: WriteTar) -> list[str]:
    folder = tmp_path_factory.mktemp("mixed")
    paths = []
    for shard, count in enumerate([12, 20, 8]):
        members = []
        for number in range(count):
            key, (width, height) = f"{shard}{number:03d}", SIZES[number % 4]
            record = {"similarity": number / 20, "width": width}
            image = make_image(width, height, seed=number, format="JPEG")
            members += [
                (f"{key}.jpg", image if key != "1004" else image[:30]),
                (f"{key}.txt", b"word " * (number % 5) if number % 5 else b"w"),
                (f"{key}.json", json.dumps(record).encode() if key != "0003" else b"{broken"),
            ]
        paths.append(write_tar(folder / f"{shard}.tar", members))
    return paths


def taken(index: ShardIndex) -> list[tuple[int, int]]:
    return [
        index.span(shard, i) for shard in range(len(index.shards)) for i in range(int(index.counts[shard]))
    ]


def test_a_filter_takes_what_it_says_and_the_report_says_why_the_rest_is_left(shards: list[str]) -> None:
    selection = Selection(filter="similarity >= 0.2 and width > 32", min_caption_words=2)
    report = check_shards(shards, selection=selection)
    index = ShardIndex.open(shards, selection=selection)
    wanted = [
        n
        for count in (12, 20, 8)
        for n in range(count)
        if n >= 4 and SIZES[n % 4][0] > 32 and max(1, n % 5) >= 2
    ]
    assert index.total == report.selected == len(wanted)
    false = sum(n < 4 or SIZES[n % 4][0] <= 32 for count in (12, 20, 8) for n in range(count)) - 1
    assert report.dropped == {"filter": false, "filter_unknown": 1, "caption": 40 - false - 1 - len(wanted)}
    whole = ShardIndex.open(shards)
    assert (
        whole.total == 40 and set(taken(index)) < set(taken(whole)) and whole.fingerprint != index.fingerprint
    )
    with pytest.raises(DataError, match="no sample that is selected"):
        ShardIndex.open(shards, selection=Selection(filter="similarity > 9"), build_missing=True)


def test_selections_are_made_once_and_only_for_new_shards(
    shards: list[str], make_image: MakeImage, write_tar: WriteTar, tmp_path: Path
) -> None:
    selection = Selection(min_image_side=38)
    assert check_shards(shards[:2], "headers", selection=selection).looked_through == 2
    again = check_shards(shards, "headers", selection=selection)
    assert again.looked_through == 1 and again.selected == 19  # the broken image is left out
    assert check_shards(shards, "headers", selection=Selection(min_image_side=39)).looked_through == 3
    with pytest.raises(DataError, match="no index for these filters"):
        ShardIndex.open(shards, selection=Selection(min_image_side=33))
    path = write_tar(tmp_path / "a.tar", [("1.jpg", make_image(50, 50, format="JPEG")), ("1.txt", b"t")])
    assert ShardIndex.open([path], selection=selection, build_missing=True).total == 1
    write_tar(Path(path), [("2.jpg", make_image(60, 50, format="JPEG")), ("2.txt", b"tt")])
    with pytest.raises(DataError, match="changed since it was indexed"):
        ShardIndex.open([path], selection=selection, build_missing=True)


def test_bucket_shapes_have_one_area_and_bounded_ratios() -> None:
    shapes = bucket_shapes(256, 32, 2.0)
    assert shapes[0] == (256, 256) and len(set(shapes)) == len(shapes) > 4
    for width, height in shapes:
        assert width % 32 == height % 32 == 0 and 0.7 * 256**2 <= width * height <= 256**2
        assert max(width, height) <= 2 * min(width, height) and (height, width) in shapes
    assert bucket_of(1000, 1010, shapes) == 0 and shapes[bucket_of(4000, 1000, shapes)] == (320, 192)
    for bad in ((256, 100, 2.0), (256, 64, 0.5), (4096, 1, 2.0)):
        with pytest.raises(ConfigError, match="bucket"):
            bucket_shapes(*bad)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    legs=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_buckets_keep_their_shares_and_a_resume_goes_on(
    weights: list[int], legs: list[tuple[int, int]], seed: int
) -> None:
    shares = np.array(weights) / sum(weights)
    straight, resumed = BucketCursor(shares, seed), BucketCursor(shares, seed)
    for batch, steps in legs:
        resumed = BucketCursor(shares, seed, list(resumed.consumed))  # as from a checkpoint
        for _ in range(steps):
            assert straight.take(batch) == resumed.take(batch)
    largest = max(batch for batch, _ in legs)
    assert np.abs(shares * straight.position - straight.consumed).max() <= (len(weights) + 1) * largest


def batches(
    index: ShardIndex, world: int, batch: int, steps: int, consumed: list[int] | None, workers: int = 0
):
    """[(keys, shape)] of each step, and the state after them."""
    item = ImageItem(40, seed=1, crop="random", shapes=SELECTION.shapes)
    position = sum(consumed or [])
    loaders = [
        Loader(index, item, seed=1, rank=rank, world=world, global_batch=batch, rank_micro_batch=1,
               position=position, consumed=consumed, workers=workers, block_shards=2)
        for rank in range(world)
    ]  # fmt: skip
    found = []
    for _ in range(steps):
        micro = [part for loader in loaders for part in itertools.islice(loader, loader.accumulation)]
        (shape,) = {tuple(part["image"].shape[1:]) for part in micro}  # one shape on all ranks
        found.append(([key for part in micro for key in part["key"]], shape))
    states = [loader.consumed for loader in loaders]
    assert all(state == states[0] for state in states) and sum(states[0]) == position + steps * batch
    for loader in loaders:
        loader.close()
    return found, states[0]


SELECTION = Selection(shapes=((40, 40), (56, 28), (28, 56)))


def test_each_step_has_one_shape_on_all_ranks_and_every_sample_comes_once_an_epoch(shards: list[str]) -> None:
    index = ShardIndex.open(shards, selection=SELECTION, build_missing=True)
    assert index.bucket_counts.sum(axis=0).tolist() == [19, 10, 10]
    found, consumed = batches(index, 2, 2, 60, None)
    shapes = {(3, 40, 40): 19, (3, 28, 56): 10, (3, 56, 28): 10}
    for shape, count in shapes.items():
        keys = [key for step, its in found if its == shape for key in step]
        for start in range(0, len(keys) - count, count):
            assert len(set(keys[start : start + count])) == count
    assert sorted(consumed) == sorted(
        sum(len(step) for step, its in found if its == shape) for shape in shapes
    )
    assert batches(index, 1, 2, 60, None) == (found, consumed)


def test_buckets_resume_with_other_ranks_workers_and_batches(shards: list[str]) -> None:
    index = ShardIndex.open(shards, selection=SELECTION, build_missing=True)
    straight, middle = batches(index, 1, 6, 5, None)
    elastic, state = batches(index, 2, 6, 5, None)
    assert (elastic, state) == (straight, middle)
    wanted, end = batches(index, 1, 12, 4, middle)
    for world, workers in ((1, 2), (3, 0), (4, 1)):
        assert batches(index, world, 12, 4, middle, workers) == (wanted, end)
    seen = Counter(key for step, _ in straight + wanted for key in step)
    assert (
        max(seen.values()) <= 4
    )  # 78 samples of 39: nothing is drawn again before its bucket's epoch is over


def test_a_run_in_other_buckets_is_refused(shards: list[str]) -> None:
    index = ShardIndex.open(shards, selection=SELECTION, build_missing=True)
    with pytest.raises(ConfigError, match="in the middle of 2 buckets"):
        batches(index, 1, 2, 1, [2, 2])
