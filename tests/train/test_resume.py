"""Stopping and going on: bit for bit on the same ranks, and within rounding on others, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ldmscale.checkpoint.shards import Reader

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SETTINGS = (
    "zero0_fp32",
    "zero0_bf16",
    "zero1_bf16",
    "zero2_fp32",
    "zero3_fp32",
    "zero3_fp32_persistent",
    "zero3_bf16_persistent",
)
CHANGES = (
    (1, "elastic3_on_1_as_zero3"),
    (1, "elastic3_on_1_as_zero1"),
    (1, "elastic0_on_1_as_zero3"),
    (2, "elastic3_on_2_as_zero1"),
    (2, "elastic3_on_2_as_zero0"),
    (2, "elastic0_on_2_as_zero3"),
    (2, "elastic1_on_2_as_zero2"),
    (3, "elastic3_on_3_as_zero3"),
    (3, "elastic1_on_3_as_zero3"),
    (3, "elastic3_on_3_as_zero2"),
)


def assert_equal_to_the_bit(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in ("losses", "outputs", "draws", "steps_of_adam", "counts"):
        assert found[key] == expected[key], key
    one, other = Reader(found["checkpoint"]), Reader(expected["checkpoint"])
    assert one.manifest.keys.keys() == other.manifest.keys.keys()
    assert not [key for key in one.manifest.keys if not torch.equal(one.tensor(key), other.tensor(key))]


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_equals_straight_bit_for_bit_on_the_same_ranks(
    name: str, straight: Mapping[str, Any], resumed_on_2: Mapping[str, Any]
) -> None:
    """In a new process, from other initial weights: losses, weights, moments, averages, outputs, random states."""
    assert_equal_to_the_bit(resumed_on_2[name], straight[name])
    assert straight[name]["steps_of_adam"] == [8]


@pytest.mark.parametrize("name", SETTINGS)
def test_rolling_back_in_the_same_process_equals_straight(name: str, straight: Mapping[str, Any]) -> None:
    """Here forward weights that a restore forgets would still be those of the end."""
    assert straight[name]["outputs_rolled_back_equal"]
    assert_equal_to_the_bit(straight[name]["again"], straight[name])


@pytest.mark.parametrize(("ranks", "name"), CHANGES)
def test_another_number_of_ranks_or_another_stage_goes_on_with_the_same_training(
    ranks: int, name: str, straight: Mapping[str, Any], request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(f"resumed_on_{ranks}")[name]
    expected = straight[found["from"]]
    losses, wanted = summed(found["losses"]), summed(expected["losses"])
    assert losses == pytest.approx(wanted, rel=1e-6)
    one, other = Reader(found["checkpoint"]), Reader(expected["checkpoint"])
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema", "ema_0.5", "power_0.1", "frozen"):
        names = one.names("denoiser", kind)
        assert sorted(names) == sorted(other.names("denoiser", kind)) and names
        for parameter in names:
            key = f"denoiser/{kind}/{parameter}"
            difference = (one.tensor(key) - other.tensor(key)).norm() / (other.tensor(key).norm() + 1e-30)
            assert difference < 1e-6, key


def summed(losses: list[list[str]]) -> list[float]:
    """Loss of each step over the samples of all ranks."""
    return [sum(map(float.fromhex, step)) for step in zip(*losses, strict=True)]


def test_a_network_that_was_never_updated_is_saved_too(straight: Mapping[str, Any]) -> None:
    reader = Reader(straight["zero3_fp32"]["checkpoint"])
    assert reader.networks() == ["denoiser", "judge"]
    assert reader.kinds("judge") == ["master"]
    assert reader.state["networks"]["judge"]["updates"] == 0
    assert reader.state["networks"]["denoiser"]["updates"] == 8


def test_whole_weights_can_be_read_without_any_rank(straight: Mapping[str, Any]) -> None:
    reader = Reader(straight["zero3_bf16_persistent"]["checkpoint"])
    raw, averaged = reader.weights("denoiser"), reader.weights("denoiser", "ema")
    assert raw.keys() == averaged.keys()
    assert raw["calls"].dtype == torch.int64 and raw["calls"].item() == 16
    assert raw["fixed.weight"].shape == (10, 10) and raw["fixed.weight"].dtype == torch.float32
    assert raw["blocks.0.conv.weight"].shape == (10, 10, 3, 3)
    assert raw["blocks.0.conv.weight"].dtype == torch.float32
    assert not torch.equal(raw["blocks.0.conv.weight"], averaged["blocks.0.conv.weight"])


def test_what_cannot_be_restored_or_saved_is_refused_by_name_and_changes_nothing(
    resumed_on_2: Mapping[str, Any],
) -> None:
    messages = resumed_on_2["refusals"]["messages"]
    assert messages["other_shape"].startswith("CheckpointError")
    assert (
        "denoiser/master/outlet.weight has shape [3, 10, 1, 1], the model's has [3, 11, 1, 1]"
        in messages["other_shape"]
    )
    assert "no network 'generator'" in messages["other_name"]
    assert "judge/master/first.weight is not in the model" in messages["other_name"]
    assert "inside an accumulation window" in messages["in_window"]
    assert "inside averaged_weights" in messages["in_average"]
    assert resumed_on_2["refusals"]["unchanged"]
