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

from ldmscale.train.engine.master_weights import Fragment, Layout
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

    def publish(self) -> None:
        if self.weights.dtype != self.master.dtype:
            self.weights.copy_(self.master.detach())


class Replicated:
    """Takes the place of DeepSpeed's engine at ZeRO-0, with the part of its surface that `Engine` uses."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        options: EngineOptions,
        device: torch.device,
    ) -> None:
        self.module = network.to(device=device, dtype=options.compute_dtype)
        self.micro_steps = self.global_steps = self.skipped_steps = 0
        self._options = options
        self._norm = 0.0
        self._applied = False
        self.refuse_next = False  # the next update, whatever its gradient
        self._is_gradient_accumulation_boundary: bool | None = None
        self._flats = [_Flat(group["params"]) for group in groups]
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

    def _start_equal(self) -> None:
        """All ranks begin with the weights of rank 0."""
        if dist.get_world_size() == 1:
            return
        for flat in self._flats:
            dist.broadcast(flat.master.detach(), 0)
            flat.publish()
        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                dist.broadcast(parameter.detach(), 0)

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self._options.accumulation_steps).backward()  # type: ignore[no-untyped-call]

    def is_gradient_accumulation_boundary(self) -> bool:
        if self._is_gradient_accumulation_boundary is not None:
            return self._is_gradient_accumulation_boundary
        return (self.micro_steps + 1) % self._options.accumulation_steps == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """What `is_gradient_accumulation_boundary` says until it is set to None again, as in DeepSpeed's engine."""
        self._is_gradient_accumulation_boundary = is_boundary

    def get_global_grad_norm(self) -> float:
        return self._norm

    def was_step_applied(self) -> bool:
        return self._applied

    @torch.no_grad()
    def step(self) -> None:
        closes = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        if not closes:
            return
        ranks = dist.get_world_size()
        for flat in self._flats:
            flat.close_window()
            if ranks > 1:
                for bucket in torch.split(flat.gradient, self._options.bucket_elements):
                    dist.all_reduce(bucket)
        parts = [torch.linalg.vector_norm(f.gradient.view(-1, _ROW), dim=1) for f in self._flats]
        self._norm = float(torch.linalg.vector_norm(torch.cat(parts))) / ranks
        self._applied = math.isfinite(self._norm) and not self.refuse_next
        self.refuse_next = False
        if self._applied:
            # AdamW divides by it on its way: the mean over the ranks and the clipping cost no pass of their own.
            scale = ranks / self._clipping()
            setattr(self.optimizer, "grad_scale", torch.tensor(scale, device=self._flats[0].gradient.device))  # noqa: B010
            self.optimizer.step()
            for flat in self._flats:
                flat.publish()
        else:
            self.skipped_steps += 1
        self.global_steps += 1
        for flat in self._flats:
            flat.open_window()

    def _clipping(self) -> float:
        limit = self._options.gradient_clip_norm
        return 1.0 if limit is None else min(1.0, limit / (self._norm + 1e-6))

    def layout(self) -> Layout:
        """Where the masters lie: whole on every rank."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
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

        def publish() -> None:
            for flat in self._flats:
                flat.publish()

        masters: list[Tensor] = [flat.master for flat in self._flats]
        return Layout(masters, fragments, publish)
