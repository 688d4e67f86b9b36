"""A generator against a discriminator, each in an engine of its own, with accumulation, as plain torch trains them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_persistent", "zero3_leaf"])
def test_two_engines_with_accumulation_match_plain_torch(name: str, trained_on_2: Mapping[str, Any]) -> None:
    found, plain = trained_on_2[f"adversarial_{name}"], trained_on_2["adversarial_plain"]
    assert min(plain["weight"]) > 0.05 and max(plain["norm_d"]) > 1.0  # the terms are alive
    for key in ("weight", "generator", "judge", "norm_g", "norm_d"):
        assert found[key] == pytest.approx(plain[key], rel=1e-5), key
