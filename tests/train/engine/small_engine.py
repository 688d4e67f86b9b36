"""Small engines of every ZeRO stage in one process, and the same network and gradients in plain PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.train.engine.engine import Engine, sharded_construction
from ldmscale.train.engine.options import EngineOptions

sys.path.insert(0, str(Path(__file__).parents[1]))
from toy import Toy, batch

DEVICE = torch.device("cpu")
ACCUMULATION = 2
SIZE = 3  # samples in a micro-batch


def plain() -> Toy:
    torch.manual_seed(0)
    return Toy()


def engine_of(stage: int, precision: str = "fp32") -> Engine:
    options = EngineOptions(
        stage, precision, SIZE, ACCUMULATION, learning_rate=1e-2, persistence_threshold=50
    )
    torch.manual_seed(0)
    with sharded_construction(options):
        network = Toy()
    return Engine("toy", network, options, DEVICE)


def loss_of(network: Engine | Toy, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The loss of micro-batch `number`."""
    x, t, y = batch(number * SIZE, SIZE)
    return F.mse_loss(network(x.to(dtype), t.to(dtype)).float(), y)


def window(engine: Engine, first: int, *, discard: bool = False) -> list[float]:
    """The losses of one accumulation window from micro-batch `first` on."""
    losses = []
    for number in range(first, first + ACCUMULATION):
        loss = loss_of(engine, number, engine.compute_dtype)
        engine.backward(loss)
        engine.step(discard=discard)
        losses.append(loss.item())
    return losses


def plain_gradients(first: int) -> dict[str, Tensor]:
    """The mean gradient of one window, by parameter."""
    network = plain()
    for number in range(first, first + ACCUMULATION):
        (loss_of(network, number) / ACCUMULATION).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
