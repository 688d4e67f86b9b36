"""What ldmscale reads and writes of DeepSpeed's private state means what it is used for, on real engines of ZeRO-1 to 3."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmscale.train.engine import deepspeed_internals as internals
from ldmscale.train.engine.deepspeed_backend import DeepSpeedBackend
from ldmscale.train.engine.engine import Engine
from ldmscale.train.engine.process import connect, disconnect

sys.path.insert(0, str(Path(__file__).parent))
from small_engine import (
    ACCUMULATION,
    DEVICE,
    SIZE,
    engine_of,
    loss_of,
    plain,
    plain_gradients,
    window,
)

KINDS = [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    connect(DEVICE)
    yield
    disconnect()


@pytest.fixture(params=KINDS, ids=lambda kind: f"zero{kind[0]}_{kind[1]}")
def engine(request: pytest.FixtureRequest) -> Engine:
    return engine_of(*request.param)


@pytest.fixture
def inner(engine: Engine) -> Any:
    """DeepSpeed's engine."""
    backend = engine._backend
    assert isinstance(backend, DeepSpeedBackend)
    return backend._engine


def trained() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in plain().named_parameters() if p.requires_grad}


def ranges(engine: Engine, inner: Any) -> dict[str, tuple[int, int, int, int]]:
    """By parameter: offset, numel, number of the master, start in it."""
    found: dict[str, tuple[int, int, int, int]] = {}
    names = {id(p): name for name, p in engine.network.named_parameters()}
    if not internals.shards_parameters(inner.optimizer):
        parts = {n: internals.master_range(p) for n, p in engine.network.named_parameters()}
        return {name: tuple(part) for name, part in parts.items() if part is not None}
    for flat, group in enumerate(internals.zero3_groups(inner.optimizer)):
        start = 0
        for parameter in group:
            offset, numel = internals.zero3_range(inner.optimizer, parameter)
            found[names[id(parameter)]] = offset, numel, flat, start
            start += internals.zero3_shard_numel(parameter)
    return found


def test_counters_follow_micro_batches_windows_and_windows_without_an_update(
    engine: Engine, inner: Any
) -> None:
    assert internals.counters(inner) == (0, 0, 0)
    loss = loss_of(engine, 0, engine.compute_dtype)
    engine.backward(loss)
    engine.step()
    assert internals.counters(inner) == (1, 0, 0)
    engine.backward(loss_of(engine, 1, engine.compute_dtype))
    engine.step()
    assert internals.counters(inner) == (2, 1, 0)
    window(engine, 2, discard=True)
    assert internals.counters(inner) == (4, 2, 1)
    assert inner.global_samples == 2 * ACCUMULATION * SIZE


def test_counters_that_are_set_decide_when_a_window_ends(engine: Engine, inner: Any) -> None:
    internals.set_counters(inner, 7, 3, 1)
    assert internals.counters(inner) == (7, 3, 1)
    assert inner.is_gradient_accumulation_boundary()
    assert inner.global_samples == 3 * ACCUMULATION * SIZE
    internals.set_counters(inner, 8, 4, 1)
    assert not inner.is_gradient_accumulation_boundary()


def test_the_counters_decide_again_after_a_boundary_that_was_set(engine: Engine, inner: Any) -> None:
    inner.set_gradient_accumulation_boundary(True)
    assert inner.is_gradient_accumulation_boundary()
    internals.count_windows_again(inner)
    assert not inner.is_gradient_accumulation_boundary()
    straight = engine_of(engine.options.zero_stage, engine.options.precision)
    for first in (0, 2):
        assert window(engine, first) == window(straight, first)


def test_deepspeed_does_not_build_its_shared_memory_collectives() -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = True
    internals.skip_shared_memory_extension()
    assert build_shm_op() is None


def test_shapes_and_shards_of_parameters_are_those_of_the_whole_network(engine: Engine) -> None:
    sharded = engine.options.zero_stage == 3
    names = set()
    for (name, parameter), whole in zip(engine.network.named_parameters(), plain().parameters(), strict=True):
        assert internals.whole_shape(parameter) == tuple(whole.shape)
        assert internals.whole_numel(parameter) == whole.numel()
        shard = internals.shard(parameter)
        assert (shard is not None) == sharded
        if shard is not None:
            assert torch.equal(shard.view(-1)[: whole.numel()], whole.detach().view(-1).to(shard.dtype))
            names.add(name)
    assert not sharded or "fixed.weight" in names, "of parameters that are not trained too"


def test_masters_are_what_the_base_optimizer_steps_on(engine: Engine, inner: Any) -> None:
    assert internals.shards_parameters(inner.optimizer) == (engine.options.zero_stage == 3)
    masters = internals.masters(inner.optimizer)
    optimizer = internals.base_optimizer(inner.optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {master.dtype for master in masters} == {torch.float32}
    before = [master.detach().clone() for master in masters]
    window(engine, 0)
    stepped_on = [p for group in optimizer.param_groups for p in group["params"]]
    # ZeRO-3 puts each master into the optimizer for its own step only.
    assert engine.options.zero_stage == 3 or {id(p) for p in stepped_on} == {id(m) for m in masters}
    assert all(torch.any(optimizer.state[master]["exp_avg"] != 0) for master in masters)
    assert not any(torch.equal(old, new) for old, new in zip(before, masters, strict=True))


def test_ranges_find_every_trained_parameter_in_the_masters(engine: Engine, inner: Any) -> None:
    masters, found = internals.masters(inner.optimizer), ranges(engine, inner)
    assert found.keys() == trained().keys()
    for name, whole in trained().items():
        offset, numel, flat, start = found[name]
        assert (offset, numel) == (0, whole.numel()), "one rank has all"
        held = masters[flat].detach().view(-1)[start : start + numel]
        assert torch.equal(held, whole.view(-1).to(engine.compute_dtype).float())
    fixed = engine.network.fixed.weight
    if engine.options.zero_stage == 3:
        assert internals.zero3_range(inner.optimizer, fixed) == (0, 100)
        assert internals.zero3_shard_numel(fixed) == 100


def test_masters_that_were_written_reach_the_forward_pass(engine: Engine, inner: Any) -> None:
    window(engine, 0)  # small parameters of ZeRO-3 stay gathered from now on
    for flat in internals.masters(inner.optimizer):
        flat.data.zero_()
    masters, found = internals.masters(inner.optimizer), ranges(engine, inner)
    reference = plain().to(engine.compute_dtype)
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            _, numel, flat, start = found[name]
            held = masters[flat].data.view(-1)[start : start + numel]
            held.copy_(2 * parameter.detach().float().view(-1))
            parameter.data.mul_(2)
    internals.sync_params_from_master(inner.optimizer)
    with torch.no_grad():
        losses = [loss_of(network, 5, engine.compute_dtype) for network in (engine, reference)]
        assert torch.equal(*losses)


def test_gradients_of_a_window_are_those_of_plain_pytorch(engine: Engine, inner: Any) -> None:
    for number in range(ACCUMULATION):
        engine.backward(loss_of(engine, number, engine.compute_dtype))
        if number + 1 < ACCUMULATION:
            engine.step()
    shards = internals.gradient_shards(inner.optimizer)
    whole = internals.whole_gradients(inner.optimizer)
    by_bf16_optimizer = (engine.options.zero_stage, engine.options.precision) == (1, "bf16")
    assert bool(whole) == by_bf16_optimizer and bool(shards) != by_bf16_optimizer
    found = torch.cat([part.detach().float().view(-1) for part in whole or shards])
    expected = torch.cat([gradient.view(-1) for gradient in plain_gradients(0).values()])
    error = (found[: len(expected)] - expected).norm() / expected.norm()
    assert error < {"fp32": 1e-6, "bf16": 2e-2}[engine.options.precision]
    (whole or shards)[0].view(-1)[0] = torch.nan
    assert not engine.step() and engine.skipped_updates == 1, "the first element is judged"


@pytest.mark.parametrize("done", [1, ACCUMULATION])
def test_gradients_that_were_discarded_have_no_part_in_the_next_window(
    engine: Engine, inner: Any, done: int
) -> None:
    straight = engine_of(engine.options.zero_stage, engine.options.precision)
    assert window(engine, 0) == window(straight, 0)
    before = internals.counters(inner)
    for number in range(done):
        engine.backward(loss_of(engine, 50 + number, engine.compute_dtype))
        if number + 1 < done:
            engine.step()
    internals.discard_gradients(inner.optimizer)
    assert not any(torch.any(part != 0) for part in engine.gradients())
    internals.set_counters(inner, *before)
    for first in (2, 4):
        assert window(engine, first) == window(straight, first)
    assert all(torch.equal(a, b) for a, b in zip(engine.masters, straight.masters, strict=True))
