"""How much bad data a run puts up with, and the one stop that all ranks make when it is too much.

A batch that one rank cannot have would leave the others waiting for ever. So every micro-batch is taken by all ranks
together: each says how it went before any of them works on it, and what one cannot do stops all, alike.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ldmscale.data.loading.loader import Batch, Loader
from ldmscale.distributed.collectives import gather_lists, sums_over_ranks
from ldmscale.errors import DataError, LdmscaleError

log = logging.getLogger(__name__)

_FREE_FAULTS = 20  # samples that may be bad before their share counts
_LISTED = 8  # ranks whose faults are told


@dataclass(frozen=True)
class Budget:
    """What may be bad.

    Attributes:
        max_share: of the samples read by all ranks since the start.
        max_in_a_row: samples one after another on one rank.
    """

    max_share: float = 1.0
    max_in_a_row: int = 1_000_000


def next_for_all(loader: Loader, budget: Budget | None = None) -> Batch:
    """The next micro-batch of this rank, if every rank has one and the budget holds. Collective.

    Raises:
        DataError: on all ranks alike (`shared`), if one of them cannot go on or too much was bad.
        LdmscaleError: likewise, if a worker of one of them broke.
    """
    limits = budget or Budget()
    batch: Batch = {}
    fault, broken = "", None
    try:
        batch = next(loader)
        if loader.bad_in_a_row > limits.max_in_a_row:
            fault = (
                f"{loader.bad_in_a_row} samples one after another cannot be used, more than "
                f"data.max_bad_in_a_row={limits.max_in_a_row}; data_ledger.jsonl names them"
            )
    except DataError as error:
        fault = str(error)
    except (
        Exception
    ) as error:  # a worker that was killed, say: the others must hear of it before this rank ends
        fault, broken = f"{type(error).__name__}: {error}", error
    failed, broke, replaced, read = sums_over_ranks(
        [bool(fault), broken is not None, loader.replaced, loader.read]
    )
    if failed:
        told = gather_lists([f"rank {loader.rank}: {fault}"] if fault else [])
        if broke:
            raise LdmscaleError("\n".join(told), shared=True) from broken
        raise DataError(told[:_LISTED], shared=True)
    if replaced > _FREE_FAULTS and replaced > limits.max_share * read:
        raise DataError(
            f"{replaced:.0f} of the {read:.0f} samples that were read since the start cannot be used, more than "
            f"data.max_bad_share={limits.max_share}; data_ledger.jsonl names them; `ldmscale index "
            "data.check=decode data.shards=...` looks through all",
            shared=True,
        )
    return batch
