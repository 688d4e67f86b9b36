"""Training without ZeRO: every rank holds everything, the weights as one vector and their gradients as another.

The reduction over the ranks, the norm, AdamW and the moving average are then one pass over one tensor each,
instead of one over every parameter. The parameters are views of the vector of weights. bf16 weights have fp32 masters, and
their gradients are accumulated and reduced in fp32, as under ZeRO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmscale.train.engine.backend import Counters
from ldmscale.train.engine.master_weights import Fragment, ShardLayout
from ldmscale.train.engine.options import EngineOptions

_ALIGNED = 16  # elements: each parameter begins on a boundary of 64 bytes, in fp32
_ROW = 1024  # elements of one partial norm: fp32 sums of millions of squares lose digits


class _Flat:
    """The parameters of one optimiser group behind one another, and a vector of the same layout for gradients."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.starts = []
        end = 0
        for parameter in self.parameters:
            self.starts.append(end)
            end += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        like = self.parameters[0]
        weights = torch.zeros(-(-end // _ROW) * _ROW, dtype=like.dtype, device=like.device)
        self.gradient = torch.zeros_like(weights, dtype=torch.float32)
        self.gradient_views = [self._view(self.gradient, index) for index in range(len(self.starts))]
        self.filled = [False] * len(self.starts)  # in this window
        self._nodes: list[torch.autograd.graph.Node] = []  # autograd itself does not keep them
        for index, parameter in enumerate(self.parameters):
            view = self._view(weights, index)
            view.copy_(parameter.detach())
            parameter.data = view
            self._collect_gradient(index)
        self.weights = weights
        self.master = nn.Parameter(weights.float())  # the same memory in fp32
        self.master.grad = self.gradient

    def _view(self, flat: Tensor, index: int) -> Tensor:
        parameter = self.parameters[index]
        return flat.narrow(0, self.starts[index], parameter.numel()).view(parameter.shape)

    def _collect_gradient(self, index: int) -> None:
        view, filled = self.gradient_views[index], self.filled

        def collect(gradients: tuple[Tensor | None, ...]) -> tuple[None] | None:
            """Take the gradient over while it is warm in the cache; autograd's own tensor goes at once.

            Before autograd accumulates it, which would copy gradients of another memory format once more.
            """
            (gradient,) = gradients
            if gradient is None:
                return None
            if filled[index]:
                view.add_(gradient)
            else:
                view.copy_(gradient)
                filled[index] = True
            return (None,)

        node = torch.autograd.graph.get_gradient_edge(self.parameters[index]).node
        node.register_prehook(collect)
        self._nodes.append(node)

    def close_window(self) -> None:
        """What no loss of this window reached has a gradient of zero, not that of the window before."""
        for index, filled in enumerate(self.filled):
            if not filled:
                self.gradient_views[index].zero_()

    def open_window(self) -> None:
        self.filled[:] = [False] * len(self.filled)

    def sync_weights_from_master(self) -> None:
        if self.weights.dtype != self.master.dtype:
            self.weights.copy_(self.master.detach())


class ReplicatedEngine:
    """The backend of an engine at ZeRO-0."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        options: EngineOptions,
        device: torch.device,
    ) -> None:
        self.network = network.to(device=device, dtype=options.compute_dtype)
        self.counters = Counters(0, 0, 0)
        self._options = options
        self._norm = 0.0
        self._applied = False
        self._invalid = False  # the gradients of this window, whatever their norm
        self._closes_next = False  # the window, whatever the counters
        self._flats = [_Flat(group["params"]) for group in groups]
        self._grad_scale = torch.ones(
            (), device=device
        )  # filled on the device: a copy would make the host wait
        with torch.no_grad():
            self._start_equal()
        decayed = [
            {"params": [flat.master], "weight_decay": group["weight_decay"]}
            for flat, group in zip(self._flats, groups, strict=True)
        ]
        rate = options.learning_rate
        self.optimizer: torch.optim.Optimizer
        if options.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(decayed, lr=rate, fused=True)
        else:
            self.optimizer = torch.optim.AdamW(
                decayed, lr=rate, betas=options.betas, eps=options.eps, fused=True
            )
        self.layout = self._layout()

    def _start_equal(self) -> None:
        """All ranks begin with the weights of rank 0."""
        if dist.get_world_size() == 1:
            return
        for flat in self._flats:
            dist.broadcast(flat.master.detach(), 0)
            flat.sync_weights_from_master()
        for parameter in self.network.parameters():
            if not parameter.requires_grad:
                dist.broadcast(parameter.detach(), 0)

    def __call__(self, *args: Any) -> Any:
        return self.network(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self._options.accumulation_steps).backward()  # type: ignore[no-untyped-call]

    def closes_window(self) -> bool:
        number = self.counters.micro_batches + 1
        return self._closes_next or number % self._options.accumulation_steps == 0

    def close_next_window(self, closes: bool) -> None:
        self._closes_next = closes

    def gradient_norm(self) -> float:
        return self._norm

    def update_applied(self) -> bool:
        return self._applied

    def invalidate_gradients(self) -> None:
        self._invalid = True

    def discard_gradients(self) -> None:
        for flat in self._flats:
            flat.open_window()

    def gradients(self) -> list[Tensor]:
        return [flat.gradient for flat in self._flats]

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        return 0, parameter.numel()

    @torch.no_grad()
    def step(self) -> None:
        closes = self.closes_window()
        micro_batches, windows, skipped = self.counters
        if not closes:
            self.counters = Counters(micro_batches + 1, windows, skipped)
            return
        ranks = dist.get_world_size()
        for flat in self._flats:
            flat.close_window()
            if ranks > 1:
                for bucket in torch.split(flat.gradient, self._options.bucket_elements):
                    dist.all_reduce(bucket)
        parts = [torch.linalg.vector_norm(f.gradient.view(-1, _ROW), dim=1) for f in self._flats]
        self._norm = float(torch.linalg.vector_norm(torch.cat(parts))) / ranks
        self._applied = math.isfinite(self._norm) and not self._invalid
        self._invalid = False
        if self._applied:
            # AdamW divides by it on its way: the mean over the ranks and the clipping cost no pass of their own.
            scale = ranks / self._clipping()
            setattr(self.optimizer, "grad_scale", self._grad_scale.fill_(scale))  # noqa: B010
            self.optimizer.step()
            for flat in self._flats:
                flat.sync_weights_from_master()
        self.counters = Counters(micro_batches + 1, windows + 1, skipped + (not self._applied))
        for flat in self._flats:
            flat.open_window()

    def _clipping(self) -> float:
        limit = self._options.gradient_clip_norm
        return 1.0 if limit is None else min(1.0, limit / (self._norm + 1e-6))

    def _layout(self) -> ShardLayout:
        """Where the masters lie: whole on every rank."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        fragments = [
            Fragment(
                names[id(parameter)],
                tuple(parameter.shape),
                0,
                parameter.numel(),
                flat=number,
                start=start,
                replicated=True,
            )
            for number, flat in enumerate(self._flats)
            for parameter, start in zip(flat.parameters, flat.starts, strict=True)
        ]

        def sync_params_from_master() -> None:
            for flat in self._flats:
                flat.sync_weights_from_master()

        masters: list[Tensor] = [flat.master for flat in self._flats]
        return ShardLayout(masters, fragments, sync_params_from_master)
