"""Shards, index, order, decoding, captions, the latents format, and the loader."""

from ldmscale.data.loading.stream import ShardStream
from ldmscale.data.shards.mixture import WeightedShards

__all__ = ["ShardStream", "WeightedShards"]
