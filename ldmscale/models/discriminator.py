"""The patch discriminator of the autoencoders' adversarial loss (Isola et al. 2017, appendix 6.1.2).

4x4 convolutions, leaky ReLU 0.2; one real-or-fake logit for each overlapping patch. 256 px -> 30x30 logits
with three layers.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ldmscale.models.layers import NORM_GROUPS


class PatchConv2d(nn.Conv2d):
    """4x4 convolution whose weight is drawn from N(0, 0.02^2)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # the bias keeps PyTorch's draw
        nn.init.normal_(self.weight, 0.0, 0.02)


class PatchBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose weight is drawn from N(1, 0.02^2)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, 1.0, 0.02)


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
            nn.LeakyReLU(0.2),
        ]
        current = channels
        for layer in range(1, layers + 1):
            size = channels * min(2**layer, 8)
            parts += [
                PatchConv2d(current, size, stride=2 if layer < layers else 1, bias=False),
                PatchBatchNorm2d(size) if norm == "batch" else nn.GroupNorm(NORM_GROUPS, size),
                nn.LeakyReLU(0.2),
            ]
            current = size
        parts.append(PatchConv2d(current, 1, stride=1, bias=True))
        self.main = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] in [-1, 1] -> logits [B, 1, h, w]."""
        result: Tensor = self.main(images)
        return result
