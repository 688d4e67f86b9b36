"""The sharded moving average is the plain one, asserted on what the forward pass gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ldmscale.train.engine.ema import ShardedEma

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_persistent", "zero3_leaf")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_outputs_by_the_average_are_those_of_an_unsharded_average(
    name: str, trained_on_2: Mapping[str, Any]
) -> None:
    assert trained_on_2["plain"]["averaged_differs_by"] > 0.05  # raw and averaged outputs are far apart
    found = trained_on_2[f"{name}_fp32"]
    assert found["averaged_error"] < 1e-6
    assert found["raw_error"] < 1e-6
    found = trained_on_2[f"{name}_bf16"]
    assert found["averaged_differs_by"] > 0.05
    assert found["averaged_error"] < 0.02
    assert found["raw_error"] < 0.02


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{stage}_{precision}" for stage in STAGES for precision in ("fp32", "bf16")]
)
def test_raw_weights_come_back_bit_for_bit_and_nothing_trains_meanwhile(
    name: str, trained_on_2: Mapping[str, Any]
) -> None:
    found = trained_on_2[name]
    assert found["raw_again"]
    assert found["module_equals_engine"]  # samplers call the raw module
    assert found["refused_inside"]


def test_the_decay_warms_up_as_published() -> None:
    weight = torch.zeros(3)
    ema = ShardedEma([weight], 0.9999)
    decays = []
    for _ in range(3):
        decays.append(ema.current_decay())
        ema.update()
    assert decays == [2 / 11, 3 / 12, 4 / 13]
    ema.updates = 10**6
    assert ema.current_decay() == 0.9999
    assert ShardedEma([weight], 0.5, warmup=False).current_decay() == 0.5


def test_the_average_moves_by_one_minus_decay() -> None:
    weight = torch.tensor([1.0, 2.0])
    ema = ShardedEma([weight], 0.75, warmup=False)
    weight += 4.0
    ema.update()
    assert ema.averages[0].tolist() == [2.0, 3.0]
    ema.reset()
    assert ema.averages[0].tolist() == [5.0, 6.0]
    assert ema.updates == 0


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.0"):
        ShardedEma([], 1.0)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [(1, "zero3"), (2, "zero3"), (2, "zero1")])
def test_power_function_averages_on_shards_and_one_made_of_them_are_those_of_the_whole_trajectory(
    ranks: int, name: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(f"trained_on_{ranks}")[f"power_{name}"]
    assert found["stored"] == 5 and found["between_tracked"] > 0.05
    assert found["error_0.1"] < 1e-5 and found["error_0.2"] < 1e-5  # tracked: the closed form to rounding
    assert found["error_0.15"] < 0.02 * found["between_tracked"]  # from stored states of every other update
