"""The samples of a run: where reading starts, what names the order, and which samples a measurement takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.training_data import BadDataLimit, TrainingData
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.mixture import Mixture, WeightedShards
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import DataError

WriteShards = Callable[..., list[str]]
BAD = {"0000003": b"no image", "0010001": b""}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards) -> Mixture:
    shards = write_shards(tmp_path_factory.mktemp("set"), [7, 4, 9], BAD)
    return Mixture.open([WeightedShards(shards)], build_missing=True)


def data_of(index: Mixture, **changed: Any) -> TrainingData:
    settings: dict[str, Any] = {
        "seed": 5,
        "global_batch": 4,
        "rank_micro_batch": 2,
        "block_shards": 2,
        "workers": 0,
        "pin_memory": False,
        "ledger": Ledger(None, 0),
        "limit": BadDataLimit(),
    }
    return TrainingData(index, ImageItem(8, seed=5), Ranks(), **(settings | changed))


def test_reading_continues_where_a_start_says(index: Mixture) -> None:
    straight, resumed = data_of(index), data_of(index)
    straight.start(0)
    keys = [straight.next_batch()["key"] for _ in range(6)]
    assert straight.position == 12
    resumed.start(8, None)
    assert [resumed.next_batch()["key"] for _ in range(2)] == keys[4:]
    assert resumed.position == straight.position and resumed.consumed == straight.consumed


def test_batches_before_a_start_are_refused(index: Mixture) -> None:
    with pytest.raises(RuntimeError, match="call it first"):
        data_of(index).next_batch()


def test_the_fingerprint_names_everything_that_the_order_depends_on(index: Mixture) -> None:
    fingerprint = data_of(index).fingerprint
    assert data_of(index, global_batch=8, workers=2).fingerprint == fingerprint
    assert data_of(index, seed=6).fingerprint != fingerprint
    assert data_of(index, block_shards=3).fingerprint != fingerprint


def test_the_first_samples_come_in_whole_steps_and_leave_reading_alone(index: Mixture) -> None:
    data = data_of(index)
    data.start(0)
    first = data.next_batch()
    found = list(data.first_samples(5))
    assert torch.cat([batch["position"] for batch in found]).tolist() == list(range(8))
    assert torch.cat([batch["counts"] for batch in found]).tolist() == [True] * 5 + [False] * 3
    assert found[0]["key"] == first["key"]
    assert data.next_batch()["position"].tolist() == [2, 3]


def test_the_first_sample_does_not_depend_on_the_seed_of_the_run(index: Mixture) -> None:
    assert data_of(index).first_sample()["key"] == data_of(index, seed=9).first_sample()["key"]


def test_more_unusable_samples_in_a_row_than_allowed_end_the_reading(index: Mixture) -> None:
    data = data_of(index, limit=BadDataLimit(max_in_a_row=0))
    data.start(0)
    with pytest.raises(DataError, match=r"data\.max_bad_in_a_row=0"):
        for _ in range(20):
            data.next_batch()
