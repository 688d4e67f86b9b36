"""Micro-batches do not depend on workers or world; bad samples are replaced alike everywhere."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.skipped_samples import Ledger, read_ledger
from ldmscale.data.loading.training_data import BadDataLimit, next_for_all
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import Sample
from ldmscale.errors import ConfigError, DataError

WriteShards = Callable[..., list[str]]
ITEM = ImageItem(8, seed=5, crop="random", flip=True, caption_source="txt")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> ShardIndex:
    bad = {"0000003": b"no image", "0010001": b"", "0020002": b"\x89PNG\r\n\x1a\n half"}
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("set"), [7, 4, 9], bad), build_missing=True)


def batches(
    index: ShardIndex, world: int, workers: int, steps: int, position: int = 0
) -> list[dict[str, Any]]:
    """Global batches of 12 in micro-batches of 1, put together from all ranks."""
    loaders = [
        Loader(
            index, ITEM, seed=5, rank=rank, world=world, global_batch=12, rank_micro_batch=1,
            position=position, workers=workers, block_shards=2,
        )
        for rank in range(world)
    ]  # fmt: skip
    found = []
    for _ in range(steps):
        micro = [batch for loader in loaders for batch in itertools.islice(loader, loader.accumulation)]
        found.append(
            {
                "image": torch.cat([batch["image"] for batch in micro]),
                "position": torch.cat([batch["position"] for batch in micro]),
                "key": [key for batch in micro for key in batch["key"]],
                "caption": [caption for batch in micro for caption in batch["caption"]],
            }
        )
    assert {loader.position for loader in loaders} == {position + steps * 12}
    for loader in loaders:
        loader.close()
    return found


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["position"], b["position"])
        and a["key"] == b["key"]
        and a["caption"] == b["caption"]
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def straight(index: ShardIndex) -> list[dict[str, Any]]:
    return batches(index, world=1, workers=0, steps=5)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (4, 0), (1, 1), (1, 2), (3, 2)])
def test_batches_are_the_same_for_any_world_and_workers(
    index: ShardIndex, straight: list[dict[str, Any]], world: int, workers: int
) -> None:
    steps = 5 if world * workers < 6 else 2
    assert same(batches(index, world, workers, steps), straight[:steps])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resume_goes_on_with_the_same_batches(
    index: ShardIndex, straight: list[dict[str, Any]], step: int
) -> None:
    # Step 2 begins inside the second epoch of 20 samples; a bad sample's stand-in is the same again.
    assert same(batches(index, 2, step % 2, 5 - step, position=step * 12), straight[step:])


def test_batches_are_full_and_hold_no_bad_sample(straight: list[dict[str, Any]]) -> None:
    assert torch.cat([batch["position"] for batch in straight]).tolist() == list(range(60))
    seen = {key for batch in straight for key in batch["key"]}
    assert len(seen) == 17 and not seen & {"0000003", "0010001", "0020002"}
    assert straight[0]["image"].dtype == torch.uint8 and straight[0]["image"].shape == (12, 3, 8, 8)
    assert straight[0]["caption"] == [f"caption {key}" for key in straight[0]["key"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_skipped_sample_is_written_down(tmp_path: Path, index: ShardIndex, workers: int) -> None:
    path = tmp_path / "run" / "data_ledger.jsonl"
    loader = Loader(
        index,
        ITEM,
        seed=5,
        rank=0,
        world=1,
        global_batch=4,
        rank_micro_batch=4,
        workers=workers,
        ledger=Ledger(path, 0),
    )
    for _ in itertools.islice(loader, 5):
        pass
    loader.close()
    entries = [entry for entry in read_ledger(path) if entry["position"] < 20]
    assert {entry["key"] for entry in entries} == {"0000003", "0010001", "0020002"}
    assert {os.path.basename(entry["shard"]) for entry in entries} == {"00000.tar", "00001.tar", "00002.tar"}
    assert all(set(entry) == {"shard", "key", "reason", "position", "rank", "time"} for entry in entries)
    assert loader.replaced >= 3


def test_a_data_set_that_is_mostly_bad_stops(tmp_path: Path, write_shards: WriteShards) -> None:
    bad = {f"000{number:04d}": b"x" for number in range(0, 40, 2)}
    index = ShardIndex.open(write_shards(tmp_path, [40], bad), build_missing=True)
    loader = Loader(index, ITEM, seed=0, rank=0, world=1, global_batch=4, rank_micro_batch=4)
    with pytest.raises(DataError, match=r"more than data\.max_bad_share=0\.1") as caught:
        for _ in range(100):
            next_for_all(loader, BadDataLimit(max_share=0.1))
    assert caught.value.shared and loader.replaced > 20
    every = {f"000{number:04d}": b"x" for number in range(4)}
    index = ShardIndex.open(write_shards(tmp_path / "all", [4], every), build_missing=True)
    with pytest.raises(DataError, match="check=decode"):
        next(Loader(index, ITEM, seed=0, rank=0, world=1, global_batch=1, rank_micro_batch=1, workers=1))


def test_position_moves_when_a_step_is_complete(index: ShardIndex) -> None:
    loader = Loader(index, ITEM, seed=0, rank=0, world=2, global_batch=8, rank_micro_batch=2, position=16)
    seen = [loader.position]
    for _ in itertools.islice(loader, 4):
        seen.append(loader.position)
    assert loader.accumulation == 2 and seen == [16, 16, 24, 24, 32]


def test_close_forgets_what_workers_had_prepared(index: ShardIndex) -> None:
    wanted = [batch["position"].tolist() for batch in itertools.islice(_plain(index, 0), 6)]
    loader = _plain(index, 2)
    got = [batch["position"].tolist() for batch in itertools.islice(loader, 3)]
    loader.close()
    got += [batch["position"].tolist() for batch in itertools.islice(loader, 3)]
    loader.close()
    assert got == wanted


def _plain(index: ShardIndex, workers: int) -> Loader:
    return Loader(index, ITEM, seed=0, rank=0, world=1, global_batch=2, rank_micro_batch=2, workers=workers)


class SlowItem:
    def __call__(self, sample: Sample, position: int) -> dict[str, np.ndarray | str | int]:
        time.sleep(0.02)
        return {"number": position, "name": sample.key, "values": np.full(3, position, dtype=np.float16)}


def test_waiting_is_measured_and_items_are_stacked_by_kind(index: ShardIndex) -> None:
    loader = Loader(index, SlowItem(), seed=0, rank=0, world=1, global_batch=4, rank_micro_batch=4)
    began = time.perf_counter()
    batch = next(loader)
    time.sleep(0.01)  # the consumer's own time does not count
    assert 0.08 <= loader.wait_seconds <= time.perf_counter() - began
    assert batch["number"].dtype == torch.int64 and batch["values"].dtype == torch.float16
    assert batch["values"].shape == (4, 3) and batch["name"] == batch["key"]


def test_signals_to_workers_do_not_break_the_loader(index: ShardIndex) -> None:
    loader = Loader(index, SlowItem(), seed=0, rank=0, world=1, global_batch=4, rank_micro_batch=4, workers=1)
    next(loader)
    (worker,) = loader._iterator._workers  # type: ignore[union-attr]
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert [batch["position"][0].item() for batch in itertools.islice(loader, 20)] == list(range(4, 84, 4))
    loader.close()
    assert worker.exitcode == 0  # it ended by itself


def test_the_loader_leaves_torch_s_generator_alone(index: ShardIndex) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    loader = _plain(index, 1)
    next(loader)
    loader.close()
    assert torch.equal(torch.rand(3), wanted)


def test_batches_that_do_not_divide_are_refused(index: ShardIndex) -> None:
    with pytest.raises(ConfigError, match="rank_micro_batch=3 does not divide"):
        Loader(index, ITEM, seed=0, rank=0, world=2, global_batch=8, rank_micro_batch=3)
    with pytest.raises(ConfigError, match="multiple of 2"):
        Loader(index, ITEM, seed=0, rank=0, world=2, global_batch=7, rank_micro_batch=1)


def test_a_run_that_moves_between_ranks_workers_and_batches_sees_one_sequence(index: ShardIndex) -> None:
    straight = Loader(
        index, ITEM, seed=5, rank=0, world=1, global_batch=1, rank_micro_batch=1, block_shards=2
    )
    wanted = [batch["key"][0] for batch in itertools.islice(straight, 2 * 12 + 3 * 4 + 2 * 6 + 1 * 8)]
    found: list[str] = []
    position = 0
    for world, workers, batch, steps in ((2, 1, 12, 2), (1, 0, 4, 3), (3, 2, 6, 2), (4, 1, 8, 1)):
        loaders = [
            Loader(index, ITEM, seed=5, rank=rank, world=world, global_batch=batch, rank_micro_batch=1,
                   position=position, workers=workers, block_shards=2)
            for rank in range(world)
        ]  # fmt: skip
        for _ in range(steps):
            found += [
                key
                for loader in loaders
                for micro in itertools.islice(loader, loader.accumulation)
                for key in micro["key"]
            ]
        position = loaders[0].position
        for loader in loaders:
            loader.close()
    assert found == wanted
