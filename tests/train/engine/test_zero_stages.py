"""Every ZeRO stage on one rank and on two trains as plain torch does, and skips what plain torch must not take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_persistent", "zero3_leaf")


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_norms_over_ten_steps_are_those_of_plain_torch_on_two_ranks(
    name: str, trained_on_2: Mapping[str, Any]
) -> None:
    found, plain = trained_on_2[f"{name}_fp32"], trained_on_2["plain"]
    assert len(found["losses"]) == 10
    assert relative(found["losses"], plain["losses"]) < 1e-6
    assert relative(found["norms"], plain["norms"]) < 3e-6


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_one_rank_trains_as_two_at_the_same_global_batch(
    name: str, trained_on_1: Mapping[str, Any], trained_on_2: Mapping[str, Any]
) -> None:
    one, two = trained_on_1[f"{name}_fp32"], trained_on_2[f"{name}_fp32"]
    assert relative(one["losses"], two["losses"]) < 1e-6
    assert relative(one["norms"], two["norms"]) < 3e-6
    assert relative(trained_on_1[f"{name}_bf16"]["losses"], trained_on_2[f"{name}_bf16"]["losses"]) < 2e-3


def test_the_norm_is_the_one_before_clipping(trained_on_2: Mapping[str, Any]) -> None:
    assert max(trained_on_2["zero3_fp32"]["norms"]) > 0.3  # the limit


def test_stages_that_shard_agree_in_bf16_to_the_last_digits(trained_on_2: Mapping[str, Any]) -> None:
    """The same weights from the same seed, also under sharded construction, and fp32 accumulation at every stage."""
    expected = trained_on_2["zero2_bf16"]["losses"]
    for name in ("zero1", "zero3", "zero3_persistent"):
        assert relative(trained_on_2[f"{name}_bf16"]["losses"], expected) < 1e-4, name
    assert relative(trained_on_2["zero0_bf16"]["losses"], expected) < 1e-3  # accumulates in bf16


@pytest.mark.parametrize("name", STAGES)
def test_bf16_stays_near_fp32(name: str, trained_on_2: Mapping[str, Any]) -> None:
    assert relative(trained_on_2[f"{name}_bf16"]["losses"], trained_on_2["plain"]["losses"]) < 5e-3
    assert trained_on_2[f"{name}_bf16"]["master_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("name", STAGES)
def test_an_update_comes_with_the_last_micro_batch_of_a_window(
    name: str, trained_on_2: Mapping[str, Any]
) -> None:
    found = trained_on_2[f"{name}_fp32"]
    assert found["updated"] == [False, True] * 10
    assert found["updates"] == 10
    assert found["calls"] == 20  # the buffer counts forward passes in training


@pytest.mark.parametrize("name", STAGES)
def test_fragments_cover_every_trained_parameter_once(name: str, trained_on_2: Mapping[str, Any]) -> None:
    found = trained_on_2[f"{name}_fp32"]
    trained = found["parameters"] - 100  # `fixed` is frozen
    assert found["held_by_all"] == (2 * trained if name == "zero0" else trained)
    assert found["held_here"] == (trained if name == "zero0" else pytest.approx(trained / 2, abs=10))


@pytest.mark.parametrize("name", ["zero0_fp32", "zero1_bf16", "zero2_fp32", "zero3_bf16"])
def test_a_loss_that_is_not_finite_on_one_rank_and_a_discarded_window_are_skipped_by_all(
    name: str, trained_on_2: Mapping[str, Any]
) -> None:
    found = trained_on_2[f"not_finite_{name}"]
    assert found["updated"] == [False, True, False, False, False, False, False, True]
    assert found["counts"] == [2, 2]
    assert found["kept"] and found["moved"] and found["finite"]
    assert [math.isfinite(norm) for norm in found["norms"]] == [True, False, False, True]


def test_running_statistics_are_those_of_rank_0_on_every_rank(trained_on_2: Mapping[str, Any]) -> None:
    found = trained_on_2["statistics"]
    assert found["of_ranks"] == [found["of_rank_0"]] * 2
    assert found["of_rank_0"][0] != [0.0, 0.0, 0.0] and found["of_rank_0"][2] == 2


def test_blocks_that_are_gathered_whole_are_so_at_stage_3_only_where_asked(
    trained_on_2: Mapping[str, Any],
) -> None:
    found = {name: trained_on_2[f"{name}_fp32"]["gathered_whole"] for name in STAGES}
    assert found == dict.fromkeys(STAGES, 0) | {"zero3_leaf": 2}
