"""How every job begins: compose, read and check the configuration, before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from ldmscale import redact
from ldmscale.config import JOBS, AutoencoderJob, DiffusionJob, Job, WandbSyncJob
from ldmscale.config.checks import check
from ldmscale.config.compose import compose_valid, misplaced_experiment
from ldmscale.config.inherit import inherited
from ldmscale.config.typed import read
from ldmscale.distributed.environment import Ranks, read_ranks
from ldmscale.errors import ConfigError
from ldmscale.storage.given_files import read_given_text
from ldmscale.tracking.wandb_environment import check_key

_J = TypeVar("_J", bound=Job)
_SHARDS = ("data.shards: ", "data.heldout_shards: ")
FROZEN = "--frozen"  # followed by the file of a resolved configuration, which `submit` wrote


def configured(kind: type[_J], overrides: Sequence[str]) -> tuple[_J, Ranks]:
    """The checked configuration of a job and this process's place among the ranks.

    Raises ConfigError with the faults of the command line, of the types and of the mixture together.
    """
    ranks = read_ranks()
    # Rank 0 alone talks to W&B; another node need not have its key.
    return resolved(kind, overrides, ranks.size, here=ranks.node == 0), ranks


def resolved(kind: type[_J], overrides: Sequence[str], world_size: int, *, here: bool = False) -> _J:
    """The configuration of a job that is to run on `world_size` ranks, checked; see `configured`.

    Args:
        here: the job runs in this environment, which is checked, too.
    """
    if list(overrides[:1]) == [FROZEN]:
        return _thawed(kind, overrides, world_size, here)
    job = next(name for name, type_ in JOBS.items() if type_ is kind)
    values, faults = compose_valid(job, overrides)
    if misplaced := misplaced_experiment(job, overrides):
        # All else would be faulty as well.
        raise ConfigError([*misplaced, *(fault for fault in faults if not fault.startswith("experiment"))])
    redact.register(values)
    try:
        config = inherited(read(kind, values))
    except ConfigError as error:
        typed = _keys(error.faults)
        rest = _with_stand_ins(kind, job, values, typed)
        mixture = [] if rest is None else check(inherited(cast(Job, rest)), world_size)
        # What the stand-ins themselves gave rise to is no fault of the user's.
        mixture = [fault for fault in mixture if not any(key in fault for key in typed)]
        raise ConfigError([*faults, *error.faults, *mixture]) from None
    # Of absent shards there may be many: whatever else is faulty comes first.
    faults += sorted(check(cast(Job, config), world_size), key=lambda fault: fault.startswith(_SHARDS))
    faults += _check_here(cast(Job, config)) if here else []
    if faults:
        raise ConfigError(faults)
    return config


def _check_here(config: Job) -> list[str]:
    """Faults of the environment that the job runs in."""
    if isinstance(config, (AutoencoderJob, DiffusionJob, WandbSyncJob)):
        return check_key(config.tracking.wandb)
    return []


def _thawed(kind: type[_J], arguments: Sequence[str], world_size: int, here: bool) -> _J:
    """A frozen configuration, as it was resolved then; checked again, for the number of ranks that came."""
    if len(arguments) != 2:
        raise ConfigError(f"{FROZEN} takes one file and no overrides; found {' '.join(arguments[1:])}")
    try:
        text = read_given_text(Path(arguments[1]), "give the configuration of a submission", ConfigError)
        values = redact.resolve(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{FROZEN} {arguments[1]}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{FROZEN} {arguments[1]} holds a {type(values).__name__}, expected the configuration of a submission"
        )
    if missing := redact.unresolved(values):
        raise ConfigError(
            f"{FROZEN} {arguments[1]} reads the environment variables {', '.join(missing)}, which are not set here: "
            "export them in the job's environment"
        )
    redact.register(values)
    config = inherited(read(kind, values))
    if faults := check(cast(Job, config), world_size) + (_check_here(cast(Job, config)) if here else []):
        raise ConfigError(faults)
    return config


def _keys(faults: Sequence[str]) -> list[str]:
    """The dotted keys that faults of types and names begin with."""
    return [match[0] for fault in faults if (match := re.match(r"[\w.]+", fault))]


def _with_stand_ins(kind: type[_J], job: str, values: dict[str, Any], faulty: Sequence[str]) -> _J | None:
    """The configuration with something harmless in place of its faulty values, so that the rest can be checked.

    None where that does not make it readable.
    """
    composed, _ = compose_valid(job, [])
    for key in faulty:
        section, name = _section(values, key), key.rpartition(".")[2]
        default = (_section(composed, key) or {}).get(name)
        if section is None:
            return None
        for candidate in (default, 1, "stand-in"):
            section[name] = candidate
            try:
                return read(kind, values)
            except ConfigError as error:
                left = _keys(error.faults)
                if key not in left:
                    break
        else:
            section.pop(name)  # no value will do: the key itself is unknown
    try:
        return read(kind, values)
    except ConfigError:
        return None


def _section(values: Any, key: str) -> dict[str, Any] | None:
    for part in key.split(".")[:-1]:
        values = values.get(part) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None
