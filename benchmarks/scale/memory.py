"""Resident memory of this process, from /proc."""

from __future__ import annotations

from pathlib import Path


def resident_mib() -> float:
    return _field("VmRSS:")


def peak_mib() -> float:
    """The most since the process began."""
    return _field("VmHWM:")


def _field(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name)[2].split()[0]) / 1024
