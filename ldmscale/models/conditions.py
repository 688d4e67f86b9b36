"""What a denoiser may be told besides the noisy latent, and the small networks that read it.

Rombach et al. 2022, section 3.3: captions, layouts, classes and embeddings enter by cross-attention as a
context [B, L, D]; maps, small images and masked images are joined to the latent as channels. Each reader is
named in the denoiser; the text transformer, which reads captions and layouts, has its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conditions(NamedTuple):
    """What a batch tells the denoiser; None where the model does not read it. Nothing at all: unconditional.

    A named tuple, and not a dataclass, because DeepSpeed and checkpointing look for tensors inside tuples.
    """

    token_ids: Tensor | None = None  # int64 [B, L], captions or layouts, for the text transformer
    labels: Tensor | None = None  # int64 [B], for the class embedder
    embeddings: Tensor | None = None  # [B, L, D], a context that was computed elsewhere
    # [B, K, h, w] channels to join; for a spatial rescaler a larger map, [B, K, H, W] or int64 classes [B, H, W]
    spatial: Tensor | None = None
    text: Tensor | None = None  # [B, L, D], what a frozen text encoder makes of token_ids, in place of them

    def changed(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Each part that is there after `change`: a move to a device, a choice of rows."""
        return Conditions(*(None if part is None else change(part) for part in self))

    def to(self, device: torch.device | str) -> Conditions:
        """All parts on `device`."""
        return self.changed(lambda part: part.to(device, non_blocking=True))


class Encoded(NamedTuple):
    """Conditions as the U-Net takes them."""

    context: Tensor | None  # [B, L, D]
    concat: Tensor | None  # [B, K, h, w]


class NullContext(nn.Module):
    """A learned context that stands for "no condition"; a module, so that ZeRO-3 gathers it when called."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self) -> Tensor:
        """[L, D]."""
        return self.weight


class ClassEmbedder(nn.Module):
    """One vector for each class, read as a context of a single token.

    Args:
        classes: labels are 0 to classes - 1.
        null_class: one row more, behind the others, that stands for "no class" (released: cin256-v2).
    """

    max_tokens = 1

    def __init__(self, *, classes: int, width: int, null_class: bool = True) -> None:
        super().__init__()
        self.width = width
        self.classes = classes
        self.null_label = classes if null_class else None
        self.embedding = nn.Embedding(classes + int(null_class), width)

    def forward(self, labels: Tensor) -> Tensor:
        """labels [B] int64 -> [B, 1, D]."""
        result: Tensor = self.embedding(labels)[:, None]  # [B, 1, D]
        return result


class GivenContext(nn.Module):
    """A context that comes with the data, as it is: embeddings of neighbours in retrieval-augmented models.

    Args:
        max_tokens: longest context; width: D. No embedding at all is a context of zeros.
    """

    def __init__(self, *, max_tokens: int, width: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.width = width

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, L, D] -> the same."""
        if embeddings.shape[1] > self.max_tokens or embeddings.shape[2] != self.width:
            raise ValueError(
                f"the embeddings have shape {tuple(embeddings.shape)}; expected [B, L, {self.width}] with L at "
                f"most {self.max_tokens}"
            )
        return embeddings


class ChannelMapper(nn.Conv2d):
    """A 1x1 convolution without bias. Of a map of class numbers it looks up what it would make of their one-hot map."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W], or int64 [B, H, W] -> [B, out, H, W]."""
        if x.dtype == torch.int64:
            return F.embedding(x, self.weight[:, :, 0, 0].t()).permute(0, 3, 1, 2)  # [B, out, H, W]
        return super().forward(x.to(self.weight.dtype))


class SpatialRescaler(nn.Module):
    """Brings a map to the size of the latent and to few channels (semantic synthesis; appendix E.2).

    Released: bilinear interpolation by one half, `halvings` times, which is the mean of 2x2 positions, then a
    1x1 convolution without bias. Both are linear, so of class numbers the convolution comes first: a one-hot
    map of 182 classes at 512x512 would be 190 MB an image.

    Args:
        in_channels: K, or the number of classes. out_channels: joined to the latent's.
        halvings: of height and width.
    """

    def __init__(self, *, in_channels: int, out_channels: int, halvings: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.halvings = halvings
        self.channel_mapper = ChannelMapper(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W], or int64 classes [B, H, W] -> [B, out, H / 2^n, W / 2^n]."""
        numbers = x.dtype == torch.int64
        if numbers:
            x = self.channel_mapper(x)  # [B, out, H, W]
        for _ in range(self.halvings):
            x = F.avg_pool2d(x, 2)  # [B, K or out, H / 2, W / 2]
        return x if numbers else self.channel_mapper(x)  # [B, out, H / 2^n, W / 2^n]
