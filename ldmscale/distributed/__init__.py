"""Ranks, devices, agreement between ranks, and stopping.

Works the same on one process, under torchrun and under Slurm.
"""
