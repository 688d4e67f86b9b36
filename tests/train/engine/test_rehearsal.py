"""A rehearsal leaves an engine as it was, also one that raises, and the engine trains on as if it had not been."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmscale.train.engine.engine import Engine
from ldmscale.train.engine.process import connect, disconnect

sys.path.insert(0, str(Path(__file__).parent))
from small_engine import DEVICE, engine_of, loss_of, window

KINDS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
PLACES = ["before the forward", "in the forward", "in the backward", "after the backward"]


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    connect(DEVICE)
    yield
    disconnect()


class Planted(Exception):
    pass


def refuse(*_: Any) -> None:
    raise Planted


def refuse_backward(_: Any, __: Any, output: Tensor) -> None:
    output.register_hook(refuse)


def micro_batch(engine: Engine, place: str) -> None:
    """One forward and backward that raises at a place."""
    if place == PLACES[0]:
        raise Planted
    layer: Any = engine.network.outlet  # behind others: at ZeRO-3 their weights are gathered
    handle = None
    if place == PLACES[1]:
        handle = layer.register_forward_pre_hook(refuse)
    elif place == PLACES[2]:
        first: Any = engine.network.blocks[0]
        handle = first.register_forward_hook(refuse_backward)
    try:
        engine.backward(loss_of(engine, 99, engine.compute_dtype))
    finally:
        if handle is not None:
            handle.remove()
    if place == PLACES[3]:
        raise Planted


def state(engine: Engine) -> dict[str, Any]:
    return {
        "masters": [master.tolist() for master in engine.masters],
        "calls": int(engine.network.calls),
        "counts": (engine.updates, engine.skipped_updates, engine.gradient_norm()),
        "counters": engine._backend.counters,
        "flags": (engine.rehearsing, engine.at_boundary, engine._backend.closes_window()),
        "level": logging.getLogger("DeepSpeed").level,
        "gradients": any(bool(torch.any(part != 0)) for part in engine.gradients()),
    }


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"zero{kind[0]}_{kind[1]}")
def test_an_engine_whose_rehearsal_raised_is_unchanged_and_trains_on(
    kind: tuple[int, str], trained: bool
) -> None:
    straight = engine_of(*kind)
    if trained:
        window(straight, 0)
    expected = state(straight)
    if kind[0] == 0:
        del expected["gradients"]  # held until the next window begins
    engine = engine_of(*kind)
    if trained:
        window(engine, 0)
    for place in PLACES:
        with pytest.raises(Planted), engine.rehearsal():
            assert engine.rehearsing
            micro_batch(engine, place)
        found = state(engine)
        assert {key: found[key] for key in expected} == expected, place
    for first in (10, 20):
        assert window(engine, first) == window(straight, first)
    assert state(engine) == state(straight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"zero{kind[0]}_{kind[1]}")
def test_an_engine_that_rehearsed_is_unchanged_and_trains_on(kind: tuple[int, str]) -> None:
    straight, engine = engine_of(*kind), engine_of(*kind)
    with engine.rehearsal():
        engine.backward(loss_of(engine, 99, engine.compute_dtype))
    before = state(straight)
    after = state(engine)
    for key in before.keys() - {"gradients"}:
        assert before[key] == after[key], key
    assert window(engine, 10) == window(straight, 10)
