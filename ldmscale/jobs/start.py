"""How every job begins: compose, read and check the configuration, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

from ldmscale.checks import check
from ldmscale.compose import compose_valid
from ldmscale.config import JOBS, Job
from ldmscale.distributed.environment import Ranks, read_ranks
from ldmscale.errors import ConfigError
from ldmscale.validate import read

_J = TypeVar("_J", bound=Job)


def configured(kind: type[_J], overrides: Sequence[str]) -> tuple[_J, Ranks]:
    """The checked configuration of a job and this process's place among the ranks.

    Raises ConfigError with the faults of the command line, of the types and of the mixture together.
    """
    job = next(name for name, type_ in JOBS.items() if type_ is kind)
    ranks = read_ranks()
    values, faults = compose_valid(job, overrides)
    try:
        config = read(kind, values) if values else None
    except ConfigError as error:
        faults += error.faults
        config = None
    if config is not None:
        faults += check(cast(Job, config), ranks.size)
    if faults:
        raise ConfigError(faults)
    assert config is not None
    return config, ranks
