"""The patch discriminator of the autoencoders' adversarial loss (Isola et al. 2017, appendix 6.1.2).

4x4 convolutions, leaky ReLU 0.2; one real-or-fake logit for each overlapping patch. 256 px -> 30x30 logits
with three layers.

A gradient penalty needs the derivative of D along a direction of its input, with a graph back to D's weights. A second
backward pass through a network cut by ZeRO-3 is not possible, so the layers can carry a tangent forward beside their
input (dual numbers): each parameter is used once, inside its own module, and one ordinary backward pass does the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.layers import NORM_GROUPS, at_least_fp32

Dual = tuple[Tensor, Tensor | None]  # a layer's output, and its derivative along the direction of the input


class PatchConv2d(nn.Conv2d):
    """4x4 convolution whose weight is drawn from N(0, 0.02^2)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # the bias keeps PyTorch's draw
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor, tangent: Tensor | None = None) -> Dual:  # type: ignore[override]
        """[B, in, H, W] -> ([B, out, H/s, W/s], its derivative along `tangent`)."""
        out: Tensor = super().forward(x)
        if tangent is None:
            return out, None
        return out, F.conv2d(tangent, self.weight, None, self.stride, self.padding)


class PatchBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose weight is drawn from N(1, 0.02^2)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, 1.0, 0.02)

    def forward(self, x: Tensor, tangent: Tensor | None = None) -> Dual:  # type: ignore[override]
        """[B, C, H, W] -> (the same shape, its derivative along `tangent`)."""
        out: Tensor = super().forward(x)
        if tangent is None:
            return out, None
        if not self.training:
            raise RuntimeError(
                "derivatives along a direction are for training, with the batch's own statistics"
            )
        change = _normalised_tangent(x, tangent, (0, 2, 3), self.eps)
        return out, change.to(x.dtype) * self.weight[:, None, None]


class PatchGroupNorm(nn.GroupNorm):
    """Group norm that carries a tangent."""

    def forward(self, x: Tensor, tangent: Tensor | None = None) -> Dual:  # type: ignore[override]
        """[B, C, H, W] -> (the same shape, its derivative along `tangent`)."""
        out: Tensor = super().forward(x)
        if tangent is None:
            return out, None
        grouped = (x.shape[0], self.num_groups, -1)
        change = _normalised_tangent(x.reshape(grouped), tangent.reshape(grouped), (2,), self.eps)
        return out, change.view_as(x).to(x.dtype) * self.weight[:, None, None]


class PatchLeakyReLU(nn.LeakyReLU):
    """Leaky ReLU that carries a tangent."""

    def forward(self, x: Tensor, tangent: Tensor | None = None) -> Dual:  # type: ignore[override]
        """[B, C, H, W] -> (the same shape, its derivative along `tangent`)."""
        out: Tensor = super().forward(x)
        if tangent is None:
            return out, None
        return out, torch.where(x > 0, tangent, tangent * self.negative_slope)


class PatchDiscriminator(nn.Module):
    """Images to a map of logits, high for real.

    Args:
        channels: width of the first layer; doubles with every layer, up to eight times.
        layers: strided layers; the released models use 3, the ones with f8 and f16 VQ autoencoders 2.
        norm: "batch" as published. Its running statistics follow each rank's own images and so differ from
            rank to rank (they matter in eval mode only; training normalises by the rank's batch). "group" has
            no such state and gives every image the same logits whatever else is in the batch.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 64,
        layers: int = 3,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f"norm is {norm!r}; expected batch or group")
        parts: list[nn.Module] = [
            PatchConv2d(in_channels, channels, stride=2, bias=True),
            PatchLeakyReLU(0.2),
        ]
        current = channels
        for layer in range(1, layers + 1):
            size = channels * min(2**layer, 8)
            parts += [
                PatchConv2d(current, size, stride=2 if layer < layers else 1, bias=False),
                PatchBatchNorm2d(size) if norm == "batch" else PatchGroupNorm(NORM_GROUPS, size),
                PatchLeakyReLU(0.2),
            ]
            current = size
        parts.append(PatchConv2d(current, 1, stride=1, bias=True))
        self.main = nn.Sequential(*parts)

    def forward(self, images: Tensor, direction: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """images [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w]; with their derivative along a direction [B, C, H, W]."""
        x, tangent = images, direction
        for layer in self.main:
            x, tangent = layer(x, tangent)
        return x if tangent is None else (x, tangent)


def _normalised_tangent(x: Tensor, tangent: Tensor, over: tuple[int, ...], eps: float) -> Tensor:
    """Derivative of (x - mean) / sqrt(variance + eps), both taken over the axes `over`, along `tangent`; fp32 at least."""
    wide = at_least_fp32(x.dtype)
    x, tangent = x.to(wide), tangent.to(wide)
    centred = x - x.mean(over, keepdim=True)
    change = tangent - tangent.mean(over, keepdim=True)
    scale = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    return scale * (change - centred * scale.square() * (centred * change).mean(over, keepdim=True))
