"""DeepSpeed as the backend of an engine, at ZeRO-1 to 3.

DeepSpeed is imported inside functions, because its import takes seconds and fixes the accelerator for the process.
Its private state is behind `deepspeed_internals`.
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

from ldmscale.train.engine import deepspeed_internals as internals
from ldmscale.train.engine.backend import Counters
from ldmscale.train.engine.master_weights import layout_of
from ldmscale.train.engine.options import EngineOptions, deepspeed_json
from ldmscale.train.engine.process import give_back_freed_memory, quieten

log = logging.getLogger(__name__)


@contextmanager
def sharded_construction(options: EngineOptions) -> Iterator[None]:
    """Build a trained network inside: at ZeRO-3 each layer is cut into shards as soon as it is built.

    No rank ever holds the whole network. At other stages nothing happens. Pretrained networks that are not trained are
    built outside. On CPUs the weights are the same as without ZeRO for the same seed: the layers are built in fp32, and the
    engine casts the shards. On GPUs DeepSpeed builds the layers there, where the same seed gives other numbers.
    """
    if options.zero_stage < 3:
        yield
        return
    import deepspeed

    config = deepspeed_json(replace(options, precision="fp32"), dist.get_world_size())
    # The dtype comes from the configuration: as an argument it is ignored on CPU (DeepSpeed 0.19).
    with deepspeed.zero.Init(config_dict_or_path=config):
        yield


class DeepSpeedBackend:
    """DeepSpeed's engine round a network."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[dict[str, Any]],
        options: EngineOptions,
        device: torch.device,
    ) -> None:
        import deepspeed

        _cast_shards(network, options.compute_dtype)
        config = deepspeed_json(options, dist.get_world_size())
        if options.zero_stage == 3 and any(isinstance(m, options.leaf_types) for m in network.modules()):
            deepspeed.utils.set_z3_leaf_modules(network, list(options.leaf_types))
            _call_layers_apart(network, options.leaf_types)
        # Some of DeepSpeed's optimizers print memory usage while they are made.
        with redirect_stdout(io.StringIO()), _short_collections():
            self._engine, *_ = deepspeed.initialize(
                model=network, model_parameters=groups, config=config, dist_init_required=False
            )
        quieten()
        give_back_freed_memory()  # the shards that DeepSpeed has put into one piece
        self.network: nn.Module = self._engine.module
        self.layout = layout_of(self.network, self._engine.optimizer)

    @property
    def counters(self) -> Counters:
        return Counters(*internals.counters(self._engine))

    @counters.setter
    def counters(self, value: Counters) -> None:
        internals.set_counters(self._engine, *value)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return internals.base_optimizer(self._engine.optimizer)

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def closes_window(self) -> bool:
        return bool(self._engine.is_gradient_accumulation_boundary())

    def close_next_window(self, closes: bool) -> None:
        if closes:
            self._engine.set_gradient_accumulation_boundary(True)
        else:
            internals.count_windows_again(self._engine)

    def step(self) -> None:
        self._engine.step()

    def update_applied(self) -> bool:
        return bool(self._engine.was_step_applied())

    def gradient_norm(self) -> float | Tensor:
        norm: float | Tensor = self._engine.get_global_grad_norm()
        return norm

    @torch.no_grad()
    def invalidate_gradients(self) -> None:
        # Whole gradients are judged by each rank on its own. Of sharded ones one rank's are enough, and the first element
        # of rank 0's shards is never padding, where a NaN would stay for the rest of the run.
        optimizer = self._engine.optimizer
        gradients = internals.whole_gradients(optimizer)
        if not gradients and dist.get_rank() == 0:
            gradients = internals.gradient_shards(optimizer)
        for gradient in gradients:
            gradient.view(-1)[:1].fill_(math.nan)

    def discard_gradients(self) -> None:
        internals.discard_gradients(self._engine.optimizer)

    def gradients(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        held: list[Tensor | None] = [
            *internals.gradient_shards(optimizer),
            *internals.whole_gradients(optimizer),
        ]
        held += [parameter.grad for parameter in self.network.parameters()]
        held += [master.grad for master in self.layout.masters]
        return [gradient for gradient in held if gradient is not None]

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        return internals.zero3_range(self._engine.optimizer, parameter)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Limits Python's garbage collector to new objects: DeepSpeed runs it several times while it is set up."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _call_layers_apart(network: nn.Module, leaf_types: tuple[type[nn.Module], ...]) -> None:
    """Gives the linear layers of leaf modules a hook that does nothing, as DeepSpeed hooks into them without leaf modules.

    A network may join layers without hooks to one product. A copy of their gathered weights would then be kept until the
    backward pass, which is what sharding avoids.
    """
    for leaf in network.modules():
        if isinstance(leaf, leaf_types):
            for layer in leaf.modules():
                if isinstance(layer, nn.Linear) and not layer._forward_pre_hooks:
                    layer.register_forward_pre_hook(_nothing)


def _nothing(layer: nn.Module, inputs: Any) -> None:
    return None


def _cast_shards(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts the shards that `sharded_construction` made to the dtype of training."""
    for parameter in network.parameters():
        shard = internals.shard(parameter)
        if shard is not None:
            shard.data = shard.data.to(dtype)
            parameter.data = parameter.data.to(dtype)
    give_back_freed_memory()  # the fp32 shards, before masters and gradients are made
