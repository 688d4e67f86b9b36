"""What `ldmscale doctor` reports about attention on this machine."""

from __future__ import annotations

from ldmscale.builders.attention import usable_attention
from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.devices import describe
from ldmscale.distributed.process_group import World


def attention_of_ranks(world: World) -> tuple[dict[str, str], list[str]]:
    """The device and the attention operators that ran on rank 0, and a warning per rank whose backend fails. Collective."""
    found = usable_attention(world.device)
    rows = gather_lists([found.fault])
    warnings = [f"rank {rank}: {fault}" for rank, fault in enumerate(rows) if fault is not None]
    return {"device": describe(world.device), "attention": found.line}, warnings
