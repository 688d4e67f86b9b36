"""Shards, index, order, decoding, captions, the latents format, and the loader."""

from ldmscale.data.mixture import WeightedShards
from ldmscale.data.stream import ShardStream

__all__ = ["ShardStream", "WeightedShards"]
