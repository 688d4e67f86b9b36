"""Inception v3 (Szegedy et al. 2015) up to its pooled features, as the Frechet inception distance takes them.

It is the network of 2015-12-05 that Heusel et al. 2017 measured with, in the port and the key layout of PyPI's
`pytorch-fid` (which are torchvision's names). It differs from the network of torchvision in its weights and in its
pooling branches: their averages leave the border's zeros out, and the last one takes the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048
SIDE = 299  # pixels that it was trained at
NORM_EPS = 1e-3


@dataclass(frozen=True)
class Conv:
    """Convolution, norm and ReLU: keeps the map's size at stride 1, takes only whole windows at stride 2."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


@dataclass(frozen=True)
class Fork:
    """Convolutions that read the same map; their outputs are joined."""

    ways: tuple[Conv, ...]


@dataclass(frozen=True)
class Pool:
    """Over 3x3: "average" of what lies within the map or "max", both at stride 1, or "max_2" of whole windows at stride 2."""

    kind: str


Branch = tuple[Conv | Fork | Pool, ...]
WIDE, TALL, SQUARE = (1, 7), (7, 1), (3, 3)


def _fine(pooled: int) -> tuple[Branch, ...]:
    """35x35 (the paper's figure 5)."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, SQUARE),
            Conv("branch3x3dbl_3", 96, SQUARE),
        ),
        (Pool("average"), Conv("branch_pool", pooled)),
    )


def _middle(narrow: int) -> tuple[Branch, ...]:
    """17x17 with windows of 7x7 in two lines (figure 6)."""
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", narrow), Conv("branch7x7_2", narrow, WIDE), Conv("branch7x7_3", 192, TALL)),
        (
            Conv("branch7x7dbl_1", narrow),
            Conv("branch7x7dbl_2", narrow, TALL),
            Conv("branch7x7dbl_3", narrow, WIDE),
            Conv("branch7x7dbl_4", narrow, TALL),
            Conv("branch7x7dbl_5", 192, WIDE),
        ),
        (Pool("average"), Conv("branch_pool", 192)),
    )


def _coarse(pool: str) -> tuple[Branch, ...]:
    """8x8, whose windows end in a line and a column side by side (figure 7)."""
    return (
        (Conv("branch1x1", 320),),
        (
            Conv("branch3x3_1", 384),
            Fork((Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
        ),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, SQUARE),
            Fork((Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1)))),
        ),
        (Pool(pool), Conv("branch_pool", 192)),
    )


# 35x35 -> 17x17 and 17x17 -> 8x8 (figure 10)
_TO_MIDDLE: tuple[Branch, ...] = (
    (Conv("branch3x3", 384, SQUARE, 2),),
    (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, SQUARE),
        Conv("branch3x3dbl_3", 96, SQUARE, 2),
    ),
    (Pool("max_2"),),
)
_TO_COARSE: tuple[Branch, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, SQUARE, 2)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, WIDE),
        Conv("branch7x7x3_3", 192, TALL),
        Conv("branch7x7x3_4", 192, SQUARE, 2),
    ),
    (Pool("max_2"),),
)
MIXED: tuple[tuple[str, tuple[Branch, ...]], ...] = (
    ("Mixed_5b", _fine(32)),
    ("Mixed_5c", _fine(64)),
    ("Mixed_5d", _fine(64)),
    ("Mixed_6a", _TO_MIDDLE),
    ("Mixed_6b", _middle(128)),
    ("Mixed_6c", _middle(160)),
    ("Mixed_6d", _middle(160)),
    ("Mixed_6e", _middle(192)),
    ("Mixed_7a", _TO_COARSE),
    ("Mixed_7b", _coarse("average")),
    ("Mixed_7c", _coarse("max")),
)


class NormedConv(nn.Module):
    def __init__(
        self, inward: int, outward: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, outward, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outward, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(x))
        return F.relu(normed, inplace=True)


class Mixed(nn.Module):
    """Branches that read the same map, joined along the channels; `channels` come out."""

    def __init__(self, inward: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            current = inward
            for step in branch:
                if isinstance(step, Conv):
                    current = self._hold(step, current)
                elif isinstance(step, Fork):
                    current = sum(self._hold(way, current) for way in step.ways)
            self.channels += current

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, channels, H, W], or whole windows of stride 2 of them."""
        return torch.cat([self._follow(branch, x) for branch in self.branches], dim=1)

    def _hold(self, conv: Conv, inward: int) -> int:
        high, wide = conv.kernel
        padding = (high // 2, wide // 2) if conv.stride == 1 else (0, 0)
        self.add_module(conv.name, NormedConv(inward, conv.channels, conv.kernel, conv.stride, padding))
        return conv.channels

    def _follow(self, branch: Branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, Pool):
                x = _pooled(x, step.kind)
            elif isinstance(step, Conv):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(way.name)(x) for way in step.ways], dim=1)
        return x


class Inception(nn.Module):
    """21,785,568 parameters: without the classifier, which no feature passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = NormedConv(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = NormedConv(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = NormedConv(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = NormedConv(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = NormedConv(80, 192, (3, 3), 1, (0, 0))
        current = 192
        for name, branches in MIXED:
            block = Mixed(current, branches)
            self.add_module(name, block)
            current = block.channels

    def pooled(self, images: Tensor) -> Tensor:
        """images [B, 3, 299, 299] in [-1, 1] -> [B, 2048]."""
        x: Tensor = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, 2)  # [B, 64, 73, 73]
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)  # [B, 192, 35, 35]
        for name, _ in MIXED:
            x = self.get_submodule(name)(x)  # ... [B, 2048, 8, 8]
        return x.mean(dim=(2, 3))  # [B, 2048]


def _pooled(x: Tensor, kind: str) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=2) if kind == "max_2" else F.max_pool2d(x, 3, stride=1, padding=1)
