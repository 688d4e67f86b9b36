"""Composes a job's configuration with Hydra, and reports every fault of a command line at once.

Hydra stops at the first override that it cannot place. To report all mistyped keys together, a failed composition is
taken apart: each override is tried alone, and the good ones go on to the typed checks.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.resolvers import oc

from ldmscale import redact
from ldmscale.config import JOBS
from ldmscale.config.folders import (
    SEARCH_PATH,
    config_folder,
    config_folders,
    groups_of,
    options,
    sections_of,
)
from ldmscale.config.overrides import settle_overrides, typed_settings
from ldmscale.errors import ConfigError

_SHOWN_OPTIONS = 12  # of a group; more are listed by --help


def compose_job(job: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose conf/<job>.yaml with `overrides` into plain values.

    Raises ConfigError naming every override that cannot be applied.
    """
    values, faults = compose_valid(job, overrides)
    if faults:
        raise ConfigError(faults)
    return values


def compose_valid(job: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Compose with those overrides that can be applied; the faults of the others.

    Raises ConfigError where there is no such experiment: without it, all else would be faulty as well.
    """
    words = list(zip(overrides, settle_overrides(job, overrides), strict=True))
    folders = config_folders(overrides)
    faults = [
        fault
        for word, settled in words
        if (fault := _experiment_fault(job, word, settled, folders)) is not None
    ]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3", job_name=job):
        # Where the whole fails, its overrides are tried one by one, to name each that is to blame.
        if not faults:
            with suppress(HydraException, OmegaConfBaseException, ValueError):
                return _composed(job, [settled for _, settled in words]), []
        wrong = bool(faults)
        rest = [pair for pair in words if not (wrong and _key(pair[0]) == "experiment")]
        good, more = _sorted_out(job, rest, folders)
        if wrong:
            raise ConfigError([*faults, *more])
        try:
            return _composed(job, good), more
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return {}, [*more, _first_lines(error)]


def _composed(job: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        config = compose(config_name=job, overrides=list(overrides))
    except RecursionError:
        raise ValueError("a configuration file is nested too deeply: give another one") from None
    with _environment_read() as variables:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    if variables:
        redact.register_environment(OmegaConf.to_container(config, resolve=False), values, variables)
    return cast(dict[str, Any], values)


@contextmanager
def _environment_read() -> Iterator[dict[str, str]]:
    """Collects the environment variables that interpolations read while the block runs."""
    variables: dict[str, str] = {}

    def read(key: str, *default: str | None) -> str | None:
        if key in os.environ:
            variables[key] = os.environ[key]
        return oc.env(key, *default)

    OmegaConf.register_new_resolver("oc.env", read, replace=True)
    try:
        yield variables
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _sorted_out(
    job: str, words: Sequence[tuple[str, str]], folders: Sequence[Path]
) -> tuple[list[str], list[str]]:
    """Overrides that apply with the accepted choices of groups, and a fault for each of the others.

    `words`: each override as it was written, and as Hydra takes it.
    """
    own = groups_of(job)
    keys = sorted({*_dotted(_composed(job, [])), *typed_settings(job)})
    # Choices of groups first: an experiment brings the keys that later overrides change. The search path is before all.
    ordered = sorted(words, key=lambda pair: (_key(pair[0]) != SEARCH_PATH, _key(pair[0]) not in own))
    good: list[str] = []
    faults: list[str] = []
    for word, settled in ordered:
        try:
            _composed(job, [*good, settled])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            faults.append(_override_fault(job, word, error, keys, folders))
        else:
            good.append(settled)
    return [settled for _, settled in words if settled in good], faults


def _experiment_fault(job: str, word: str, settled: str, folders: Sequence[Path]) -> str | None:
    """Why an experiment cannot be chosen; None for any other override, and for one that is."""
    if _key(word) != "experiment" or "experiment" not in groups_of(job) or settled.startswith("~"):
        return None
    name = settled.partition("=")[2].strip("'\"")
    if name == "null" or name.startswith("["):
        return None
    if name not in options("experiment", folders):
        return (
            f"{word}: there is no conf/experiment/{name}.yaml; {_choices('experiment', name, job, folders)}"
        )
    if (
        len(found := [str(folder) for folder in folders if (folder / f"experiment/{name}.yaml").is_file()])
        > 1
    ):
        return (
            f"{word}: it is in {found[0]}, which goes first, and in {found[1]}: give the latter another name"
        )
    return None


def misplaced_experiment(job: str, overrides: Sequence[str]) -> list[str]:
    """The fault of an experiment of another job: it may be composed, and sets what the job does not have."""
    folders = config_folders(overrides)
    for word, settled in zip(overrides, settle_overrides(job, overrides), strict=True):
        if _key(word) != "experiment" or "experiment" not in groups_of(job):
            continue
        sections = sections_of(settled.partition("=")[2].strip("'\""), folders)
        if sections - _sections(job) and (
            others := [name for name in JOBS if not sections - _sections(name)]
        ):
            return [
                f"{word} is an experiment of another job: run `ldmscale {others[0]} {word}`, or see those of {job} with "
                f"`ldmscale {job} --help`"
            ]
    return []


def _sections(job: str) -> set[str]:
    return {*(field.name for field in fields(cast(Any, JOBS[job]))), *groups_of(job)}


def _choices(group: str, given: str, job: str, folders: Sequence[Path]) -> str:
    """The remedy for an option that there is not: those with a similar name, otherwise those that there are."""
    names = options(group, folders)
    if group == "experiment":
        names = [name for name in names if not sections_of(name, folders) - _sections(job)]
        names = sorted({*names, *(name.removesuffix(f"_{job}") for name in names)})
    if near := difflib.get_close_matches(given, names, n=3, cutoff=0.7):
        return f"did you mean {' or '.join(near)}?"
    if len(names) <= _SHOWN_OPTIONS:
        return f"choose one of {', '.join(names)}"
    return f"choose one of {', '.join(names[:_SHOWN_OPTIONS])} and {len(names) - _SHOWN_OPTIONS} more (see --help)"


def _override_fault(
    job: str, override: str, error: Exception, keys: Sequence[str], folders: Sequence[Path]
) -> str:
    key, equals, value = override.lstrip("+~").partition("=")
    if not equals and not override.startswith("~"):
        return f"{override!r} is not an override: write {key or 'key'}=VALUE, without spaces around ="
    own = groups_of(job)
    if key in own and (name := value.strip("'\"")) not in options(key, folders):
        if "," in name:
            return f"{override}: several options are a sweep: add --multirun, or choose one"
        return f"{override}: there is no conf/{key}/{name}.yaml; {_choices(key, name, job, folders)}"
    if key not in keys and key not in own and not key.startswith("hydra."):
        return _unknown(job, key, [*keys, *own])
    if "Sweep parameters" in str(error) or "Ambiguous value" in str(error):
        return (
            f"{override.lstrip('+')}: several values are a sweep: add --multirun; "
            f"a list is {key}=[A,B], and one text with commas is quoted: \"{key}='{value}'\""
        )
    if "${" in value and (fault := _interpolation_fault(override.lstrip("+"), error)):
        return fault
    return f"{override.lstrip('+')}: {_first_lines(error)}"


def _unknown(job: str, key: str, known: Sequence[str]) -> str:
    """The fault of a key or group that the job does not have."""
    owners = [other for other in JOBS if key in typed_settings(other) or key in groups_of(other)]
    if owners:
        return f"{key} is no setting of {job} (of {', '.join(owners)}): remove it, or see `ldmscale {job} --cfg job`"
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see the keys with `ldmscale {job} --cfg job`"
    return f"{key} is unknown: {hint}"


def _interpolation_fault(override: str, error: Exception) -> str | None:
    """What to write in place of `${NAME}`, where NAME is neither a setting nor a resolver."""
    names = re.findall(r"\$\{([^{}]*)\}", override)
    if not names or isinstance(error, GrammarParseError):
        return None
    bad = next((name for name in names if f"'{name}'" in str(error)), names[0])
    variable = bad if re.fullmatch(r"[A-Za-z_]\w*", bad) else "NAME"
    return (
        f"{override}: ${{{bad}}} is no setting and no resolver ({_first_lines(error)}); for an environment variable leave "
        f"the single quotes away, so that the shell puts it in, or write ${{oc.env:{variable}}}; "
        f"\\${{{bad}}} is the text as it stands"
    )


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _dotted(values: Any, path: str = "") -> list[str]:
    if not isinstance(values, dict) or not values:
        return [path]
    inner = [
        name
        for key, value in values.items()
        for name in _dotted(value, f"{path}.{key}" if path else str(key))
    ]
    return [path, *inner] if path else inner


def _first_lines(error: Exception) -> str:
    return " ".join(" ".join(str(error).strip().split("\n")[:2]).split())


def quiet_hydra() -> None:
    """Let Hydra raise instead of printing and leaving with status 1: the command line tells faults its own way."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
