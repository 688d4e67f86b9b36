"""Tar shards: listing, index, filters and reading."""
