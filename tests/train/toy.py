"""A small network of latent diffusion's layer kinds, and its data, for programs run by torchrun."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class Toy(nn.Module):
    """Images [B,3,8,8], times [B,7] to images; odd sizes, a one-element and a frozen parameter, a buffer."""

    def __init__(self, channels: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.inlet = nn.Conv2d(3, channels, 3, padding=1)
        self.time = nn.Linear(7, channels)
        self.blocks = nn.ModuleList([Block(channels) for _ in range(2)])
        self.gain = nn.Linear(1, 1, bias=False)
        self.fixed = nn.Linear(channels, channels, bias=False)
        self.fixed.weight.requires_grad_(False)
        self.outlet = nn.Conv2d(channels, 3, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        h = self.dropout(self.inlet(x) + self.time(t)[:, :, None, None])
        for block in self.blocks:
            h = block(h)
        h = h + self.fixed(h.movedim(1, -1)).movedim(-1, 1)
        h = self.gain(h.unsqueeze(-1)).squeeze(-1)
        return self.outlet(h)


class Judge(nn.Module):
    """A discriminator: images [B,3,8,8] to logits [B,1,4,4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 9, 4, stride=2, padding=1)
        self.norm = Norm(3, 9)
        self.last = nn.Conv2d(9, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.leaky_relu(self.norm(self.first(x)), 0.2))


class RealAndFake(nn.Module):
    """Both halves of a discriminator's batch in one forward pass, as its engine must see them."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge()

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.judge(real), self.judge(fake)


def batch(position: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples position .. position + count - 1 of an endless sequence: inputs, times and targets."""
    parts = []
    for number in range(position, position + count):
        generator = torch.Generator().manual_seed(1000 + number)
        x = torch.randn(3, 8, 8, generator=generator)
        parts.append((x, torch.randn(7, generator=generator), x.flip(-1) * 0.5))
    return tuple(torch.stack(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]
