"""Classifier-free guidance (Ho and Salimans 2022), on one condition or on several with a scale each (Brooks et al. 2023).

Several conditions c_1 .. c_n are added one after the other, each step with its own scale (InstructPix2Pix, eq. 3, for n = 2):

    e(none) + s_1 (e(c_1) - e(none)) + s_2 (e(c_1, c_2) - e(c_1)) + ...

With one condition this is Ho and Salimans' formula. What cancels is not computed: of a condition of scale 1 what comes before it,
of two neighbours of equal scale what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x [B,C,H,W], t [B]) -> prediction [B,C,H,W]


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond): 1 is the plain conditional prediction. All [B,C,H,W]."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided_prediction: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Give `share` of a guided prediction the spread of the conditional one, sample by sample (Lin et al. 2023, eqs. 15, 16).

    Guidance widens the prediction, which overexposes images, most where a schedule ends without signal; 0.7 in the paper.
    All [B,C,H,W].
    """
    if share == 0:
        return guided_prediction
    spread = conditional.flatten(1).std(1) / guided_prediction.flatten(1).std(1)  # [B]
    return guided_prediction * (share * spread + (1 - share))[:, None, None, None]


def needed(scales: Sequence[float]) -> tuple[list[int], list[float]]:
    """Which of the n + 1 predictions from e(none) to e(c_1 .. c_n) `scales` [n] need, and the scales between those.

    The predictions of weight 0 are left out: (1 - s_1), (s_1 - s_2) .. s_n are the weights.
    """
    chosen: list[int] = [0]
    between: list[float] = []
    for number, scale in enumerate(scales, start=1):
        if between and between[-1] == scale:
            chosen[-1] = number
        else:
            chosen.append(number)
            between.append(scale)
    if between and between[0] == 1.0:
        del chosen[0], between[0]
    return chosen, between


def guided(
    denoise: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    scales: Sequence[float],
    rescale_share: float = 0.0,
) -> Denoise:
    """A prediction that is guided on n conditions.

    Args:
        denoise: of x [M B,C,H,W], t [M B] and the numbers of M predictions: predictions [M B,C,H,W], that which is told the
            first i conditions for number i. All go through the network as one batch, told least first.
        scales: of the n conditions.
        rescale_share: see `rescale`; of the prediction that is told everything.
    """
    chosen, between = needed(scales)
    if not between:
        return lambda x, t: denoise(x, t, chosen)

    def run(x: Tensor, t: Tensor) -> Tensor:
        count = len(chosen)
        parts = denoise(torch.cat([x] * count), torch.cat([t] * count), chosen).chunk(count)
        result = guide(parts[0], parts[1], between[0])
        for (before, after), scale in zip(pairwise(parts[1:]), between[1:], strict=True):
            result = result + scale * (after - before)
        return rescale(result, parts[-1], rescale_share)

    return run
