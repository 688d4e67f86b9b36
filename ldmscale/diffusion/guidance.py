"""Classifier-free guidance (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

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


def guided(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    null_context: Tensor,
    scale: float,
    rescale_share: float = 0.0,
) -> Denoise:
    """Close `denoise(x, t, context)` over a condition [B,L,D] and its null or negative counterpart [B,L,D].

    Both halves go through the network as one batch, unconditional first; a scale of 1 needs the condition alone.
    """
    if scale == 1.0:
        return lambda x, t: denoise(x, t, context)
    both = torch.cat([null_context, context])  # [2B,L,D]

    def run(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = denoise(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return rescale(guide(unconditional, conditional, scale), conditional, rescale_share)

    return run
