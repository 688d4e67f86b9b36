"""Learning-rate curves as pure functions of the number of finished updates.

Nothing here has a state, so a resumed run needs nothing but its step to go on with the same rates.
"""

from __future__ import annotations

import math
from typing import Literal

Curve = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int,
    *,
    base: float,
    curve: Curve = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
    final_share: float = 0.0,
) -> float:
    """The rate of update number `step` (0 for the first one).

    The rate climbs linearly over the first `warmup_steps` updates, the first of them at base / warmup_steps
    and number `warmup_steps` - 1 at the full base. Then it stays ("constant"), or falls to base * final_share
    at update `total_steps` along a straight line or half a cosine, and stays there. `total_steps` counts the
    warm-up and is not used by "constant".
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if curve == "constant":
        return base
    span = total_steps - warmup_steps
    done = min(1.0, (step - warmup_steps) / span) if span > 0 else 1.0
    if curve == "linear":
        share = 1.0 - done
    elif curve == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        raise ValueError(f"learning-rate curve {curve!r}: expected constant, linear or cosine")
    return base * (final_share + (1.0 - final_share) * share)
