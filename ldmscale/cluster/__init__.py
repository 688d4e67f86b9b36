"""Slurm from the login node: what is submitted, frozen in a folder that the queued job alone reads."""
