"""The training engine: a small typed interface over DeepSpeed (ZeRO-1 to 3) and `ReplicatedEngine` (ZeRO-0).

Nothing here reads the run's configuration: `EngineOptions` holds plain values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmscale.train.engine.backend import Backend, Counters
from ldmscale.train.engine.deepspeed_backend import DeepSpeedBackend, sharded_construction
from ldmscale.train.engine.deepspeed_internals import shard, whole_numel, whole_shape
from ldmscale.train.engine.ema import ShardedEma, swap_
from ldmscale.train.engine.master_weights import Fragment
from ldmscale.train.engine.options import EngineOptions, deepspeed_json, parameter_groups
from ldmscale.train.engine.process import connect, disconnect, only_errors
from ldmscale.train.engine.replicated import ReplicatedEngine

__all__ = ["Engine", "EngineOptions", "connect", "deepspeed_json", "disconnect", "sharded_construction"]

log = logging.getLogger(__name__)


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
        backend = ReplicatedEngine if options.zero_stage == 0 else DeepSpeedBackend
        self._backend: Backend = backend(network, groups, options, device)
        self.layout = self._backend.layout
        self.network = self._backend.network
        self._persistent = frozenset(self.network.state_dict().keys())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of weights in the forward pass; inputs must be cast to it."""
        return self.options.compute_dtype

    @property
    def at_boundary(self) -> bool:
        """True between accumulation windows: no gradient is waiting for an update."""
        return self._backend.counters.micro_batches % self.options.accumulation_steps == 0

    def __call__(self, *args: Any) -> Any:
        return self._backend(*args)

    def backward(self, loss: Tensor) -> None:
        """Backward of the mean loss of one micro-batch, divided by the accumulation steps here."""
        self.refuse_averaged("backward")
        self._backend.backward(nan_if_nonfinite(loss))

    def step(self, *, discard: bool = False) -> bool:
        """Follows each backward. True when it closed an accumulation window and updated the weights.

        A window with a non-finite loss or gradient is skipped on all ranks, counted in `skipped_updates`, and returns
        False, as a step inside a window does; `at_boundary` distinguishes them. With `discard` (on all ranks) a window is
        skipped whatever its gradient.
        """
        self.refuse_averaged("step")
        if not self._backend.closes_window():
            self._backend.step()
            return False
        if discard:
            self._backend.invalidate_gradients()
        self._backend.step()
        self._norm = self._backend.gradient_norm()
        updated = self._backend.update_applied()
        if updated:
            self.updates += 1
        else:
            self.skipped_updates += 1
            self._norm = math.inf
        self._share_buffers()
        return updated

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, one forward and backward may be run, which leaves nothing behind but its peak of memory.

        The gradients are reduced as at the end of a window and thrown away; counters and buffers are restored. On a GPU
        the memory of AdamW's moments, which the first update takes, is held meanwhile.

        An exception inside leaves nothing behind either. No collective is called then, since other ranks may not have failed.
        """
        backend = self._backend
        counters, own = backend.counters, (self.skipped_updates, self._norm)
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        unborn = [
            master for master in self.masters if master.is_cuda and not self.base_optimizer.state.get(master)
        ]
        moments = [torch.empty_like(master.detach()) for master in unborn for _ in range(2)]
        backend.close_next_window(True)
        self.rehearsing = True
        try:
            yield
            self.rehearsing = False
            with only_errors():
                self.step(discard=True)
        except BaseException:
            self._discard_gradients()
            raise
        finally:
            del moments
            self.rehearsing = False
            backend.close_next_window(False)
            backend.counters = counters
            self.skipped_updates, self._norm = own
            for buffer, value in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def _discard_gradients(self) -> None:
        try:
            self._backend.discard_gradients()
        except Exception:  # the exception that is on its way says more
            log.warning("%s holds gradients of a pass that failed", self.name, exc_info=True)

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
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The AdamW (or SGD) that steps on the masters."""
        return self._backend.optimizer

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors on this rank that the optimiser steps on."""
        return self.layout.masters

    def fragments(self) -> Iterator[Fragment]:
        """Which elements of which trained parameter lie where in `masters`."""
        return iter(self.layout.fragments)

    def weights(self) -> list[Tensor]:
        """What this rank holds of the parameters as the forward pass sees them."""
        parameters = list(self.network.parameters())
        shards = [found for found in map(shard, parameters) if found is not None]
        return [tensor.detach() for tensor in (*shards, *parameters)]

    def gradients(self) -> list[Tensor]:
        """What this rank holds of gradients, between the last backward of a window and its step."""
        return self._backend.gradients()

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers, whole on every rank."""
        return ((name, b) for name, b in self.network.named_buffers() if name in self._persistent)

    def frozen_fragments(self) -> Iterator[tuple[Fragment, Tensor]]:
        """The fragment of each parameter that is not trained on this rank, with a 1-D view of its elements.

        At ZeRO-3 these parameters are sharded like the others.
        """
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                continue
            held, shape = shard(parameter), whole_shape(parameter)
            offset, numel = (
                self._backend.shard_range(parameter) if held is not None else (0, parameter.numel())
            )
            fragment = Fragment(name, shape, offset, numel, flat=-1, replicated=held is None)
            yield fragment, (parameter if held is None else held).detach().view(-1)[:numel]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole parameter, trained or not."""
        return {name: whole_shape(parameter) for name, parameter in self.network.named_parameters()}

    def parameter_count(self) -> int:
        """Parameters of the whole network, not of this rank's share."""
        return sum(whole_numel(parameter) for parameter in self.network.parameters())

    def resume_at(self, updates: int, skipped_updates: int) -> list[dict[str, Tensor]]:
        """Set the counts of a saved run; returns AdamW's state of each master, to be filled.

        Only between accumulation windows; how many micro-batches a window has may differ from the saved run.
        """
        if not self.at_boundary:
            raise RuntimeError(
                f"{self.name} holds gradients of a window that has not ended: go back after step()"
            )
        self.updates, self.skipped_updates = updates, skipped_updates
        windows = updates + skipped_updates
        micro_batches = windows * self.options.accumulation_steps
        self._backend.counters = Counters(micro_batches, windows, skipped_updates)
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
        swap_(self.masters, ema.averages)
        self.layout.sync_params_from_master()
        try:
            yield
        finally:
            swap_(self.masters, ema.averages)
            self.layout.sync_params_from_master()
            self._averaged = False

    def refuse_averaged(self, action: str) -> None:
        """Raise RuntimeError inside `averaged_weights`, where masters and average have changed places."""
        if self._averaged:
            raise RuntimeError(f"{action} of {self.name} inside averaged_weights: leave that block first")


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, whose gradient is nan where the loss itself is not finite, so that one vote on the gradient covers both.

    An infinite loss may have a finite gradient. Nothing waits for the device.
    """
    factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
    return loss * factor.to(loss.dtype)
