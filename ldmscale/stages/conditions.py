"""From a batch to what the denoiser is told: each reader of the data fills one part of `Conditions`."""

from __future__ import annotations

from ldmscale.models.conditions import Conditions
from ldmscale.train.stage import Batch


def batch_conditions(batch: Batch) -> Conditions:
    """What the readers put into a batch: "tokens" int64 [B,L], "label" int64 [B]; nothing for a model without conditions."""
    return Conditions(token_ids=batch.get("tokens"), labels=batch.get("label"))
