"""The first stage on images of any size in bounded memory: tile by tile, and the same as whole.

Three things reach across a tile's edge in these networks. Convolutions: each tile is read with as many positions around
it as they can see, and those are thrown away. Attention, which the published networks have at their coarsest levels: those
levels are run whole, as is every level whose map is no larger than that of a tile at full resolution. Group norms:
all tiles are normalised by the mean and variance of the whole map. These are found in passes over the tiles: a pass
that normalises by the statistics of the pass before makes one norm more exact, the first, the second and so on, until
a pass changes them by less than `TOLERANCE`. After as many passes as there are norms nothing is left to change.

So there is no seam for any tolerance: every tile is computed by one and the same function, which differs from the whole
network by the statistics' remaining error alone. Blending overlaps, as is often done, hides seams of tiles that were normalised
each by itself, and keeps their different tints.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.autoencoder import Blocks, KLAutoencoder, VQAutoencoder
from ldmscale.models.bottleneck import Posterior
from ldmscale.models.first_stage import FirstStageNetwork, PixelAutoencoder
from ldmscale.models.layers import GroupNorm, ResnetBlock, at_least_fp32

log = logging.getLogger(__name__)

# Of a group's mean, in its standard deviations, and of its standard deviation, as a share, between two passes.
TOLERANCE = 1e-3
_Normalise = Callable[[GroupNorm, Tensor], Tensor]
_Layer = Callable[[Tensor, _Normalise], Tensor]


@torch.no_grad()
def decode_in_tiles(
    autoencoder: FirstStageNetwork,
    latent: Tensor,
    tile_pixels: int,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """`autoencoder.decode(latent)`, one sample at a time, in tiles.

    Args:
        latent: [B, C, h, w].
        tile_pixels: side of a tile of the image, without what is read around it; an image that has no more pixels than
            a tile is decoded whole.
        tolerance: see `TOLERANCE`; 0 makes as many passes as there are norms.

    Returns:
        [B, 3, f h, f w].
    """
    if isinstance(autoencoder, PixelAutoencoder):
        return latent
    decoder, factor = autoencoder.decoder, autoencoder.downsampling
    if _small(latent.shape[2] * factor, latent.shape[3] * factor, tile_pixels):
        return torch.cat([autoencoder.decode(one) for one in torch.split(latent, 1)])
    blocks = [_as_blocks(block) for block in decoder.up_blocks]
    budget = _width_in(blocks[-1]) * tile_pixels**2
    first = _whole_blocks(blocks, latent.shape[2] * latent.shape[3], budget)
    chain = _Chain(
        [_layer(block) for block in blocks[first:]] + [_out(decoder.conv_norm_out, decoder.conv_out)]
    )
    scale = 2 ** sum(block.resample is not None for block in blocks[first:])
    halo = _halo(blocks[first:], [2**i for i in range(len(blocks) - first)], scale)
    images = []
    for one in torch.split(latent, 1):
        x = decoder.mid_block(
            decoder.conv_in(autoencoder.post_quant_conv(_quantized(autoencoder, one, budget)))
        )
        for block in blocks[:first]:
            x = block(x)  # [1, size, H_l, W_l]
        images.append(
            _in_tiles(
                chain, x, _tiles(x.shape[2], x.shape[3], tile_pixels // scale, halo), 1, scale, tolerance
            )
        )
    return torch.cat(images)


@torch.no_grad()
def encode_in_tiles(
    autoencoder: FirstStageNetwork,
    images: Tensor,
    tile_pixels: int,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """`autoencoder.encode(images).moments()`, one sample at a time, in tiles: [B, 3, H, W] -> [B, 2C or C, h, w].

    Arguments as of `decode_in_tiles`; height and width are multiples of the factor.
    """
    if isinstance(autoencoder, PixelAutoencoder):
        return images
    encoder = autoencoder.encoder
    if _small(images.shape[2], images.shape[3], tile_pixels):
        return torch.cat([autoencoder.encode(one).moments() for one in torch.split(images, 1)])
    blocks = [_as_blocks(block) for block in encoder.down_blocks]
    budget = _width_in(blocks[0]) * tile_pixels**2
    # Counted from the coarsest, as in the decoder, whose maps grow.
    coarsest = images.shape[2] * images.shape[3] // autoencoder.downsampling**2
    tiled = blocks[: len(blocks) - _whole_blocks(blocks[::-1], coarsest, budget)]
    scale = 2 ** sum(block.resample is not None for block in tiled)
    chain = _Chain([lambda x, normalise: encoder.conv_in(x), *(_layer(block) for block in tiled)])
    halo = _halo(tiled, [scale // 2**i for i in range(len(tiled))], scale)
    rows, columns = images.shape[2] // scale, images.shape[3] // scale
    moments = []
    for one in torch.split(images, 1):
        x = _in_tiles(chain, one, _tiles(rows, columns, tile_pixels // scale, halo), scale, 1, tolerance)
        for block in blocks[len(tiled) :]:
            x = block(x)  # [1, size, H_l, W_l]
        moments.append(autoencoder.quant_conv(encoder.conv_out(encoder.conv_norm_out(encoder.mid_block(x)))))
    found = torch.cat(moments)
    return Posterior.from_moments(found).moments() if isinstance(autoencoder, KLAutoencoder) else found


@dataclass(frozen=True)
class _Span:
    """Positions of one axis of the coarse map: `begin:end` belong to the tile, `low:high` are read."""

    begin: int
    end: int
    low: int
    high: int

    def read(self, scale: int) -> slice:
        """In a map `scale` times as fine."""
        return slice(self.low * scale, self.high * scale)

    def own(self, scale: int) -> slice:
        return slice(self.begin * scale, self.end * scale)

    def own_of_read(self, scale: int) -> slice:
        """The tile's own positions within those that are read."""
        return slice((self.begin - self.low) * scale, (self.end - self.low) * scale)


@dataclass
class _Group:
    """Mean and mean squared deviation of each group of a norm, float64 [G], over `count` values."""

    count: int
    mean: Tensor
    variance: Tensor

    def joined(self, other: _Group) -> _Group:
        """Over the values of both (Chan et al. 1983)."""
        count, share = self.count + other.count, other.count / (self.count + other.count)
        apart = other.mean - self.mean
        variance = torch.lerp(self.variance, other.variance, share) + apart.square() * share * (1 - share)
        return _Group(count, self.mean + apart * share, variance)


@dataclass
class _Chain:
    """Layers in their order, and what is known of their norms: of the pass before, and gathered in this one."""

    layers: Sequence[_Layer]
    known: dict[GroupNorm, _Group] = field(default_factory=dict)
    gathered: dict[GroupNorm, _Group] = field(default_factory=dict)

    def run(self, x: Tensor, tile: tuple[_Span, _Span]) -> Tensor:
        """What is read of a tile through all layers; statistics are gathered over the tile's own positions."""
        rows, columns = tile

        def normalise(norm: GroupNorm, x: Tensor) -> Tensor:
            scale_h, scale_w = (n // (s.high - s.low) for n, s in zip(x.shape[2:], tile, strict=True))
            # Of the coarse map one position may be several here, or several one.
            own = x[:, :, rows.own_of_read(scale_h), columns.own_of_read(scale_w)]
            found = _statistics(norm, own)
            before = self.gathered.get(norm)
            self.gathered[norm] = found if before is None else before.joined(found)
            return _normalised(norm, x, self.known.get(norm, found))

        for layer in self.layers:
            x = layer(x, normalise)
        return x

    def moved(self) -> float:
        """How far the statistics gathered are from those that were known; they take their place."""
        most = 0.0 if self.known else math.inf
        for norm, before in self.known.items():
            now, spread = self.gathered[norm], (before.variance + norm.eps).sqrt()
            shift = ((now.mean - before.mean) / spread).abs().max()
            change = ((now.variance + norm.eps).sqrt() / spread - 1).abs().max()
            most = max(most, float(shift), float(change))
        self.known, self.gathered = self.gathered, {}
        return most


def _in_tiles(
    chain: _Chain,
    x: Tensor,
    tiles: Sequence[tuple[_Span, _Span]],
    scale_in: int,
    scale_out: int,
    tolerance: float,
) -> Tensor:
    """x [1, C, H, W] through the chain; it is `scale_in` times as fine as the coarse map, the result `scale_out` times."""
    chain.known, chain.gathered = {}, {}
    result, passes = x.new_empty(0), 0
    while True:
        for rows, columns in tiles:
            out = chain.run(x[:, :, rows.read(scale_in), columns.read(scale_in)], (rows, columns))
            if not len(result):
                height, width = (n // scale_in * scale_out for n in x.shape[2:])
                result = out.new_empty(1, out.shape[1], height, width)
            own = out[:, :, rows.own_of_read(scale_out), columns.own_of_read(scale_out)]
            result[:, :, rows.own(scale_out), columns.own(scale_out)] = own
        passes += 1
        moved = chain.moved()
        # The first pass has no statistics of the whole map, each further one those of one norm more.
        if passes > 1 and (moved < tolerance or passes > len(chain.known)):
            log.debug("%d tiles in %d passes, statistics within %.2g", len(tiles), passes, moved)
            return result


def _tiles(height: int, width: int, side: int, halo: int) -> list[tuple[_Span, _Span]]:
    """Rows and columns of tiles of nearly equal size that cover a coarse map."""
    return [(row, column) for row in _spans(height, side, halo) for column in _spans(width, side, halo)]


def _spans(length: int, side: int, halo: int) -> Iterator[_Span]:
    count = -(-length // max(1, side))
    for number in range(count):
        begin, end = length * number // count, length * (number + 1) // count
        yield _Span(begin, end, max(0, begin - halo), min(length, end + halo))


def _halo(blocks: Sequence[Blocks], scales: Sequence[int], finest: int) -> int:
    """Coarse positions on each side that a tile's values depend on; a block works `scales` times as fine as the coarse map."""
    reach = 1 / finest  # the convolution at full resolution
    for block, scale in zip(blocks, scales, strict=True):
        reach += 2 * len(block.resnets) / scale + (0 if block.resample is None else 1 / scale)
    return math.ceil(reach) + 1  # rounded once more where positions are doubled


def _whole_blocks(blocks: Sequence[Blocks], positions: int, budget: int) -> int:
    """How many blocks, coarsest first, are run whole: all up to the last with attention, and those of small maps."""
    whole = max((i + 1 for i, block in enumerate(blocks) if block.attentions), default=0)
    for i, block in enumerate(blocks):
        resnet = block.resnets[0]
        assert isinstance(resnet, ResnetBlock)
        fine = positions * 4 ** (i + 1)  # of the map that the next block gets, or gave
        if i == whole and max(resnet.conv1.in_channels, resnet.conv1.out_channels) * fine <= budget:
            whole += 1
    return min(whole, len(blocks) - 1)


def _small(height: int, width: int, tile_pixels: int) -> bool:
    return height * width <= tile_pixels**2


def _quantized(autoencoder: KLAutoencoder | VQAutoencoder, latent: Tensor, budget: int) -> Tensor:
    """The nearest vectors of a VQ autoencoder, so many rows at a time that the distances to all vectors fit the budget."""
    if isinstance(autoencoder, KLAutoencoder):
        return latent
    rows = max(1, budget // (len(autoencoder.quantize.embedding) * latent.shape[3]))
    return torch.cat(
        [autoencoder.quantize(part).quantized for part in torch.split(latent, rows, dim=2)], dim=2
    )


def _as_blocks(block: nn.Module) -> Blocks:
    assert isinstance(block, Blocks)
    return block


def _width_in(block: Blocks) -> int:
    resnet = block.resnets[0]
    assert isinstance(resnet, ResnetBlock)
    return int(resnet.conv1.in_channels)


def _layer(block: Blocks) -> _Layer:
    def run(x: Tensor, normalise: _Normalise) -> Tensor:
        for resnet in block.resnets:
            assert isinstance(resnet, ResnetBlock)
            h = resnet.conv1(normalise(resnet.norm1, x))  # [1, size, H, W]
            h = resnet.conv2(normalise(resnet.norm2, h))  # [1, size, H, W]
            h += x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
            x = h
        return x if block.resample is None else block.resample(x)

    return run


def _out(norm: GroupNorm, conv: nn.Conv2d) -> _Layer:
    return lambda x, normalise: conv(normalise(norm, x))


def _statistics(norm: GroupNorm, own: Tensor) -> _Group:
    """Of own [1, C, H, W]."""
    groups = own.reshape(norm.num_groups, -1).to(at_least_fp32(own.dtype))  # [G, C/G H W]
    variance, mean = torch.var_mean(groups, dim=1, correction=0)  # [G] each
    return _Group(groups[0].numel(), mean.double(), variance.double())


def _normalised(norm: GroupNorm, x: Tensor, by: _Group) -> Tensor:
    """silu(group_norm(x)) with given statistics, in the type of x: [1, C, H, W]."""
    wide = at_least_fp32(x.dtype)
    each = norm.num_channels // norm.num_groups
    scale = (by.variance + norm.eps).rsqrt().repeat_interleave(each) * norm.weight.double()  # [C]
    shift = norm.bias.double() - by.mean.repeat_interleave(each) * scale  # [C]
    scale, shift = (v.to(wide)[None, :, None, None] for v in (scale, shift))
    return F.silu(torch.addcmul(shift, x.to(wide), scale), inplace=True).to(x.dtype)
