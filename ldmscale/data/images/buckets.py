"""Aspect-ratio buckets: which shapes there are, which an image goes to, and which bucket each step draws from.

All samples of a global batch are of one bucket, so all ranks have images of one shape. A bucket is visited as often
as its share of the samples says. Which bucket comes next is a function of the seed and of how many samples each
bucket has given; those counts (they add up to the position) are the whole state of the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ldmscale.distributed.rng import generator
from ldmscale.errors import ConfigError

Shape = tuple[int, int]
"""(width, height) in pixels."""

MOST_BUCKETS = 250  # a bucket's number and "not taken" share a byte in the index


def bucket_shapes(image_size: int, step: int, max_ratio: float) -> tuple[Shape, ...]:
    """Returns shapes of about image_size**2 pixels, sides multiples of `step`, from 1:max_ratio to max_ratio:1.

    For every width the largest height that keeps width * height <= image_size**2. The square comes first.

    Raises:
        ConfigError: if the step does not divide image_size, or the ratio is below 1.
    """
    if step < 1 or image_size % step or max_ratio < 1:
        raise ConfigError(
            f"data.bucket_step={step} must divide data.image_size={image_size}, and "
            f"data.bucket_max_ratio={max_ratio} must be at least 1"
        )
    found = {(image_size, image_size)}
    for width in range(step, int(image_size * math.sqrt(max_ratio)) + step, step):
        height = image_size**2 // width // step * step
        if height >= step and max(width, height) <= max_ratio * min(width, height):
            found |= {(width, height), (height, width)}
    if len(found) > MOST_BUCKETS:
        raise ConfigError(
            f"data.bucket_step={step} makes {len(found)} buckets; give a larger step (at most {MOST_BUCKETS})"
        )
    return tuple(sorted(found, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape)))


def bucket_of(width: int, height: int, shapes: Sequence[Shape]) -> int:
    """The bucket whose aspect ratio is nearest, so that the crop takes least away."""
    return nearest_ratio(width / height, shapes)


def nearest_ratio(ratio: float, shapes: Sequence[Shape]) -> int:
    """The number of the shape whose width over height is nearest to `ratio`, by their logarithms; the first of equals."""
    wanted = math.log(ratio)
    return min(
        range(len(shapes)), key=lambda number: abs(math.log(shapes[number][0] / shapes[number][1]) - wanted)
    )


class BucketCursor:
    """Which bucket each step draws from.

    Args:
        shares: of the samples, per bucket; they add up to 1.
        seed: the run's seed.
        consumed: samples that each bucket has given before.
    """

    def __init__(self, shares: np.ndarray, seed: int, consumed: Sequence[int] | None = None) -> None:
        self.shares, self.seed = shares, seed
        self.consumed = list(consumed) if consumed is not None else [0] * len(shares)
        if len(self.consumed) != len(shares):
            raise ConfigError(
                f"the run was in the middle of {len(self.consumed)} buckets, now there are {len(shares)}; give the "
                "data.bucket_* settings of before"
            )

    @property
    def position(self) -> int:
        return sum(self.consumed)

    def take(self, samples: int) -> tuple[int, int]:
        """Returns (bucket, number of its first sample) of the next step of `samples`.

        The bucket that is furthest behind its share comes next; a draw of up to one step's worth keeps the sequence
        from being periodic. So no bucket is ever more than a few steps away from its share.
        """
        if len(self.shares) == 1:
            bucket = 0
        else:
            behind = self.shares * (self.position + samples) - np.array(self.consumed)
            words = generator(self.seed, self.position, "bucket").bit_generator.random_raw(len(self.shares))
            draw = (
                samples * (np.asarray(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) / 2.0**53
            )
            bucket = int(np.argmax(np.where(self.shares > 0, behind + draw, -np.inf)))
        first = self.consumed[bucket]
        self.consumed[bucket] += samples
        return bucket, first

    def advance_to(self, position: int, samples: int) -> None:
        """Takes steps of `samples` until `position` is reached: where only the position of a run is known."""
        while self.position < position:
            self.take(min(samples, position - self.position))
