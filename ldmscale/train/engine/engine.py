"""The training engine: DeepSpeed behind a small typed surface. Beside `connection` no other file imports deepspeed.

DeepSpeed is imported inside functions, because its import takes seconds and fixes the accelerator for the
process. Nothing here reads the run's configuration: `EngineOptions` holds plain values.
"""

from __future__ import annotations

import gc
import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmscale.distributed.collectives import any_true
from ldmscale.train.engine.ema import ShardedEma, exchange
from ldmscale.train.engine.master_weights import Fragment, Layout, layout_of, zero3_range
from ldmscale.train.engine.options import EngineOptions, deepspeed_json, parameter_groups
from ldmscale.train.engine.process import connect, disconnect, give_back_freed_memory, quieten
from ldmscale.train.engine.replicated import Replicated

__all__ = ["Engine", "EngineOptions", "connect", "deepspeed_json", "disconnect", "sharded_construction"]

log = logging.getLogger(__name__)


@contextmanager
def _short_collections() -> Iterator[None]:
    """DeepSpeed collects garbage several times while it is set up: let it look at its own objects only."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _takes_fused_adam(device: torch.device) -> bool:
    """Whether DeepSpeed's FusedAdam is to be used: on CUDA, where its kernel can be built."""
    if device.type != "cuda":
        return False
    from deepspeed.ops.op_builder import FusedAdamBuilder

    reason = ""
    try:
        FusedAdamBuilder().load(verbose=False)
    except Exception as error:  # no nvcc, another CUDA than torch's, no compiler: each is told in its own way
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    # One optimiser for all: a node that lacks a compiler must not step by other kernels than the rest.
    if any_true(bool(reason)):
        log.warning(
            "DeepSpeed's FusedAdam cannot be built on every rank (%s): torch's fused AdamW is used", reason
        )
        return False
    return True


@contextmanager
def sharded_construction(options: EngineOptions) -> Iterator[None]:
    """Build a trained network inside: at ZeRO-3 each layer is cut into shards as soon as it is built.

    No rank ever holds the whole network. At other stages nothing happens. Frozen helpers are built outside.
    The weights are the same as without ZeRO for the same seed: the layers are built in fp32, and the engine
    casts the shards.
    """
    if options.zero_stage < 3:
        yield
        return
    import deepspeed

    config = deepspeed_json(replace(options, precision="fp32"), dist.get_world_size())
    # The dtype comes from the configuration: as an argument it is ignored on CPU (DeepSpeed 0.19).
    with deepspeed.zero.Init(config_dict_or_path=config):
        yield


def _cast_shards(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the shards that `sharded_construction` made their dtype for training."""
    for parameter in network.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            shard.data = shard.data.to(dtype)
            parameter.data = parameter.data.to(dtype)
    give_back_freed_memory()  # the fp32 shards, before masters and gradients are made


def _sharded(
    network: nn.Module, groups: Sequence[dict[str, Any]], options: EngineOptions, device: torch.device
) -> Any:
    """DeepSpeed's engine round a network, at ZeRO-1 to 3."""
    import deepspeed

    _cast_shards(network, options.compute_dtype)
    config = deepspeed_json(options, dist.get_world_size(), fused_adam=_takes_fused_adam(device))
    if options.zero_stage == 3 and any(isinstance(part, options.leaf_types) for part in network.modules()):
        deepspeed.utils.set_z3_leaf_modules(network, list(options.leaf_types))
    # Some of DeepSpeed's optimisers print memory usage while they are made.
    with redirect_stdout(io.StringIO()), _short_collections():
        engine, *_ = deepspeed.initialize(
            model=network, model_parameters=groups, config=config, dist_init_required=False
        )
    quieten()
    give_back_freed_memory()  # the shards that DeepSpeed has put into one piece
    return engine


class Engine:
    """One trained network with its optimiser, sharded over all ranks (by DeepSpeed) or the same on all (ZeRO-0).

    Several engines may live in one process. A network that another engine's loss passes through (the
    discriminator in the generator's step) is called as `engine.network`, frozen meanwhile, and never through
    the engine.
    """

    def __init__(self, name: str, network: nn.Module, options: EngineOptions, device: torch.device) -> None:
        self.name = name
        self.options = options
        self.device = device
        for buffer in network.buffers():
            # DeepSpeed moves a network that was built in shards nowhere, since its parameters are in place.
            buffer.data = buffer.data.to(device)
        self.updates = 0  # optimiser updates that happened
        self.skipped_updates = 0  # windows thrown away because their gradient was not finite
        self._averaged = False
        self.rehearsing = False  # a stage then keeps what it counts and writes as it is
        self._norm: float | Tensor = 0.0
        groups = parameter_groups(network, options.weight_decay, decay_vectors=options.decay_vectors)
        self._engine: Any
        self.layout: Layout
        if options.zero_stage == 0:
            self._engine = Replicated(network, groups, options, device)
            self.layout = self._engine.layout()
        else:
            self._engine = _sharded(network, groups, options, device)
            self.layout = layout_of(network, self._engine.optimizer)
        self.network: nn.Module = self._engine.module
        self._persistent = frozenset(self.network.state_dict().keys())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of weights in the forward pass; inputs must be cast to it."""
        return self.options.compute_dtype

    @property
    def at_boundary(self) -> bool:
        """True between accumulation windows: no gradient is waiting for an update."""
        return bool(self._engine.micro_steps % self.options.accumulation_steps == 0)

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the mean loss of one micro-batch; it is divided by the accumulation steps here."""
        self.refuse_averaged("backward")
        self._engine.backward(poison_unless_finite(loss))

    def step(self, *, discard: bool = False) -> bool:
        """Follows each backward. True when it closed an accumulation window and updated the weights.

        A window with a non-finite loss or gradient is thrown away on all ranks, counted in `skipped_updates`, and
        gives False; `at_boundary` tells it from a window that goes on. With `discard` (on all ranks) a window is
        thrown away whatever its gradient.
        """
        self.refuse_averaged("step")
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return False
        if discard:
            self._spoil_gradients()
        self._engine.step()
        self._norm = self._engine.get_global_grad_norm()
        updated = bool(self._engine.was_step_applied())
        if updated:
            self.updates += 1
        else:
            self.skipped_updates += 1
            self._norm = math.inf
        self._share_buffers()
        return updated

    @torch.no_grad()
    def _spoil_gradients(self) -> None:
        """Make gradients nan, so that the way in which a window is refused is taken on all ranks.

        The first element of rank 0's shards is never padding, which would stay as it is for the rest of the run.
        """
        if isinstance(self._engine, Replicated):
            self._engine.refuse_next = True
            return
        optimizer = self._engine.optimizer
        # DeepSpeed's bf16 optimiser has whole gradients on each rank, which judges them by itself.
        held = list(getattr(optimizer, "fp32_groups_actual_gradients_flat", []))
        if not held and dist.get_rank() == 0:
            held = [part for parts in optimizer.averaged_gradients.values() for part in parts or ()]
        for gradient in held:
            gradient.view(-1)[:1].fill_(math.nan)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, one forward and backward may be run, which leaves nothing behind but its peak of memory.

        The gradients are reduced as at the end of a window and thrown away; counters and buffers come back. On a GPU
        the memory of AdamW's moments, which the first update will take, is held meanwhile.
        """
        inner = self._engine
        counters = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
        before = {name: getattr(inner, name) for name in counters if hasattr(inner, name)}
        ours = self.skipped_updates, self._norm
        kept = [buffer.clone() for buffer in self.network.buffers()]
        unborn = [
            master for master in self.masters if master.is_cuda and not self.base_optimizer.state.get(master)
        ]
        moments = [torch.empty_like(master.detach()) for master in unborn for _ in range(2)]
        inner.set_gradient_accumulation_boundary(True)
        self.rehearsing = True
        yield
        self.rehearsing = False
        chatter = logging.getLogger("DeepSpeed")
        level = chatter.level
        chatter.setLevel(logging.ERROR)  # it warns of every window that is thrown away
        self.step(discard=True)
        chatter.setLevel(level)
        del moments
        inner._is_gradient_accumulation_boundary = None
        for name, value in before.items():
            setattr(inner, name, value)
        self.skipped_updates, self._norm = ours
        for buffer, value in zip(self.network.buffers(), kept, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Running statistics follow rank 0, as in DistributedDataParallel, so that all ranks have the same."""
        buffers = [tensor for _, tensor in self.buffers()]
        if not buffers or dist.get_world_size() == 1:
            return
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            together = torch.cat([buffer.reshape(-1) for buffer in same])
            dist.broadcast(together, 0)
            values = torch.split(together, [buffer.numel() for buffer in same])
            for buffer, value in zip(same, values, strict=True):
                buffer.copy_(value.view_as(buffer))

    def gradient_norm(self) -> float:
        """Global 2-norm of the last window's mean gradient, before clipping; inf if it was thrown away."""
        return float(self._norm)

    def set_learning_rate(self, value: float) -> None:
        for group in self.base_optimizer.param_groups:
            group["lr"] = value

    @property
    def base_optimizer(self) -> Any:
        """The AdamW that steps on the masters, inside whatever DeepSpeed wrapped around it."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors on this rank that the optimiser steps on."""
        return self.layout.masters

    def fragments(self) -> Iterator[Fragment]:
        """Which elements of which trained parameter lie where in `masters`."""
        return iter(self.layout.fragments)

    def weights(self) -> list[Tensor]:
        """What this rank holds of the parameters as the forward pass sees them."""
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in self.network.parameters()]
        return [tensor.detach() for tensor in held] + [p.detach() for p in self.network.parameters()]

    def gradients(self) -> list[Tensor]:
        """What this rank holds of gradients, between the last backward of a window and its step."""
        optimizer = self._engine.optimizer
        held = [
            part for parts in getattr(optimizer, "averaged_gradients", {}).values() for part in parts or ()
        ]
        held += getattr(optimizer, "fp32_groups_gradients_flat", [])
        held += [parameter.grad for parameter in self.network.parameters()]
        held += [master.grad for master in self.masters]
        return [gradient for gradient in held if gradient is not None]

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers, whole on every rank."""
        return ((name, b) for name, b in self.network.named_buffers() if name in self._persistent)

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are not trained; at ZeRO-3 they are sharded like the others."""
        return ((name, p) for name, p in self.network.named_parameters() if not p.requires_grad)

    def parameter_count(self) -> int:
        """Parameters of the whole network, not of this rank's share."""
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.network.parameters())

    def zero3_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Offset and number of the elements of a ZeRO-3 parameter (or frozen one) that lie on this rank."""
        return zero3_range(self._engine.optimizer, parameter)

    def resume_at(self, updates: int, skipped_updates: int) -> list[dict[str, Tensor]]:
        """Set the counts of a saved run; returns AdamW's state of each master, to be filled.

        Only between accumulation windows; how many micro-batches a window has may differ from the saved run.
        """
        if not self.at_boundary:
            raise RuntimeError(
                f"{self.name} holds gradients of a window that has not ended: go back after step()"
            )
        self.updates, self.skipped_updates = updates, skipped_updates
        self._engine.global_steps = updates + skipped_updates
        self._engine.skipped_steps = skipped_updates
        self._engine.micro_steps = self._engine.global_steps * self.options.accumulation_steps
        optimizer = self.base_optimizer
        if updates == 0 or self.options.optimizer == "sgd":
            optimizer.state.clear()
            return []
        for master in self.masters:
            state = optimizer.state[master]
            state["step"] = updates  # as DeepSpeed's FusedAdam counts
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(updates), device=master.device)
            for moment in ("exp_avg", "exp_avg_sq"):  # either makes them in its first update
                if moment not in state:
                    state[moment] = torch.zeros_like(master.detach())
        return [optimizer.state[master] for master in self.masters]

    @contextmanager
    def averaged_weights(self, ema: ShardedEma | None) -> Iterator[None]:
        """Inside, the forward pass uses the moving average; afterwards the raw weights again, bit for bit.

        Collective under ZeRO: every rank enters and leaves, and calls the network equally often inside. While
        inside the raw masters wait in the average's own tensors, so training, updating the average and saving
        are refused. With None (a network without average) the raw weights stay.
        """
        self.refuse_averaged("averaged_weights")
        if ema is None:
            yield
            return
        self._averaged = True
        exchange(self.masters, ema.averages)
        self.layout.publish()
        try:
            yield
        finally:
            exchange(self.masters, ema.averages)
            self.layout.publish()
            self._averaged = False

    def refuse_averaged(self, action: str) -> None:
        """Raise RuntimeError inside `averaged_weights`, where masters and average have changed places."""
        if self._averaged:
            raise RuntimeError(f"{action} of {self.name} inside averaged_weights: leave that block first")


def poison_unless_finite(loss: Tensor) -> Tensor:
    """The loss, whose gradient is nan where the loss itself is not finite, so that one vote on the gradient covers both.

    An infinite loss may have a finite gradient. Nothing waits for the device.
    """
    factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
    return loss * factor.to(loss.dtype)
