"""Errors that a user can cause and mend. Each message says what was found, what was expected, and what to do.

The command line turns a `ConfigError` or a `DataError` that is raised before training starts into exit status 2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ldmscale import messages


class LdmscaleError(Exception):
    """Base of all errors that ldmscale raises on purpose.

    Attributes:
        shared: every rank raises this error. Rank 0 alone reports it, and the ranks can still save a checkpoint together.
    """

    def __init__(self, message: str = "", *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared

    def for_all_ranks(self) -> LdmscaleError:
        """A copy with `shared` set, for an error of one rank that every rank raises."""
        error = copy.copy(self).with_traceback(self.__traceback__)
        error.__cause__ = self.__cause__
        error.shared = True
        return error

    def __str__(self) -> str:
        return messages.shown(super().__str__())


class ConfigError(LdmscaleError):
    """The configuration cannot work. Carries every fault that was found, each with its remedy."""

    def __init__(self, faults: str | Sequence[str], *, shared: bool = True) -> None:
        """`shared`: ranks read the same configuration."""
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults), shared=shared)


class DataError(LdmscaleError):
    """The data cannot be read or are not what the run needs. Carries every fault that was found."""

    def __init__(self, faults: str | Sequence[str], *, shared: bool = False) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults), shared=shared)


class CheckpointError(LdmscaleError):
    """A checkpoint cannot be written or read, or does not fit the model."""


class StoppedEarlyError(LdmscaleError):
    """A signal or a time limit came before anything was begun: run me again."""

    def __init__(self, message: str, *, shared: bool = True) -> None:
        super().__init__(message, shared=shared)
