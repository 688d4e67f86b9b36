"""Writes image shards from folders, packages and synthetic data."""
