"""Draws belong to (seed, position, purpose)."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ldmscale.distributed.rng import generator, shuffled


def _draws(arguments: tuple[int, int, str]) -> list[float]:
    return generator(*arguments).standard_normal(5).tolist()


def test_equal_arguments_give_equal_draws_in_another_process() -> None:
    code = (
        "import json; from ldmscale.distributed.rng import generator; "
        "print(json.dumps([generator(7, n, 'noise').standard_normal(5).tolist() for n in range(4)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True
    )
    assert json.loads(done.stdout) == [_draws((7, position, "noise")) for position in range(4)]


def test_every_argument_changes_the_draws() -> None:
    seen = {
        tuple(_draws(a))
        for a in [(0, 0, "noise"), (1, 0, "noise"), (0, 1, "noise"), (0, 0, "timestep"), (1, 1, "x")]
    }
    assert len(seen) == 5


def test_neighbouring_positions_are_uncorrelated() -> None:
    rows = np.stack([generator(3, position, "noise").standard_normal(2000) for position in range(20)])
    correlation = np.corrcoef(rows) - np.eye(20)
    assert np.abs(correlation).max() < 0.12  # five standard deviations of 1/sqrt(2000)
    assert abs(rows.mean()) < 0.03 and abs(rows.std() - 1) < 0.03


def test_the_draws_are_pinned() -> None:
    # Another value means that every run in flight would go on with other noise and another order.
    assert int(generator(5, 9, "drop").bit_generator.random_raw()) == 11545402987743069133
    assert shuffled(8, 1, 2, "order of shards").tolist() == [7, 4, 5, 0, 1, 3, 6, 2]


def test_positions_beyond_64_bits_and_negative_seeds_are_taken() -> None:
    assert _draws((0, 2**64 + 1, "noise")) != _draws((0, 1, "noise"))
    assert _draws((-1, 0, "noise")) == _draws((2**64 - 1, 0, "noise"))


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        generator(0, -1, "noise")


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_shuffled_is_a_permutation(count: int) -> None:
    assert sorted(shuffled(count, 3, 4, "order").tolist()) == list(range(count))
