"""Do samples follow their prompts? Measured by the nearest real images, with the level that chance would reach.

Real images are compared as the autoencoder reconstructs them, so that its errors do not count against the samples. An
answer at chance level means that the model ignores the prompt, however good its pictures look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptFollowing:
    """Shares of samples in [0,1], each with the share that a random choice among the real images would reach."""

    samples: int
    class_share: float  # the nearest real image is of the prompt's class
    class_chance: float
    own_share: float  # the prompt's own image is among the `nearest` nearest ones
    own_chance: float
    first_share: float  # the prompt's own image is the nearest one
    nearest: int
    nearest_index: tuple[int, ...]  # of each sample, among the real images


def prompt_following(
    samples: Tensor, own: Sequence[int], real: Tensor, classes: Sequence[str], nearest: int = 5
) -> PromptFollowing:
    """Score samples against all real images by their distance in pixels.

    Args:
        samples: float [N,3,H,W] in [-1,1].
        own: which real image each sample's prompt belongs to, [N].
        real: reconstructions of all real images, float [M,3,H,W].
        classes: of the real images, [M].
        nearest: how many nearest images count as found.

    Raises:
        ValueError: lengths that do not fit each other.
    """
    if len(own) != len(samples) or len(classes) != len(real) or not len(samples):
        raise ValueError(
            f"{len(samples)} samples, {len(own)} prompts, {len(real)} images, {len(classes)} classes"
        )
    distance = torch.cdist(samples.flatten(1).double(), real.flatten(1).double())  # [N,M]
    ranked = distance.argsort(dim=1)[:, :nearest]  # [N,nearest]
    first = ranked[:, 0].tolist()
    count = len(samples)
    return PromptFollowing(
        samples=count,
        class_share=sum(classes[n] == classes[o] for n, o in zip(first, own, strict=True)) / count,
        class_chance=sum(classes.count(classes[o]) / len(classes) for o in own) / count,
        own_share=sum(o in row for o, row in zip(own, ranked.tolist(), strict=True)) / count,
        own_chance=min(nearest, len(real)) / len(real),
        first_share=sum(o == n for o, n in zip(own, first, strict=True)) / count,
        nearest=nearest,
        nearest_index=tuple(first),
    )
