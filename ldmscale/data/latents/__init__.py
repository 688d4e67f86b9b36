"""Latent shards: format, writing and sharing of the work."""
