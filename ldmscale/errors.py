"""Errors that a user can cause and mend. Each message says what was found, what was expected, and what to do.

The command line turns a `ConfigError` or a `DataError` that is raised before training starts into exit status 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class LdmscaleError(Exception):
    """Base of all errors that ldmscale raises on purpose. `shared`: every rank raises it, and rank 0 tells it."""

    shared = False


class ConfigError(LdmscaleError):
    """The configuration cannot work. Carries every fault that was found, each with its remedy."""

    shared = True  # ranks read the same configuration

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class DataError(LdmscaleError):
    """The data cannot be read or are not what the run needs. Carries every fault that was found."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class CheckpointError(LdmscaleError):
    """A checkpoint cannot be written or read, or does not fit the model."""


class StoppedEarlyError(LdmscaleError):
    """A signal or a time limit came before anything was begun: run me again."""

    shared = True
