"""Refuses secrets in settings that a file is going to keep: those of a submission, and those of a sweep.

A run hides its secrets where it writes its configuration (`redact.config`), since it has the values in memory. A job that
starts from a file, and a file that Hydra writes by itself, need the name of an environment variable in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldmscale import redact
from ldmscale.config.folders import config_folder

_SHOWING = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
)


def secret_faults(values: Mapping[str, Any], keeper: str, *, hint: str = "") -> list[str]:
    """A fault for each secret that is given in plain; `keeper` is what would keep it."""
    return [
        f"{key} holds a secret, and {keeper} keeps none: put the value into an environment variable{hint}, and give "
        f"{key}='${{oc.env:NAME}}'"
        for key in redact.lost(values)
    ]


def sweep_faults(job: str, arguments: Sequence[str]) -> list[str]:
    """Faults of a command line that Hydra runs and keeps: in multirun.yaml, in .hydra where that is asked for.

    Hydra writes the overrides as they are given and the configuration before interpolations are resolved.
    """
    if any(word.split("=")[0] in _SHOWING for word in arguments):
        return []
    overrides = [override for word in arguments for override in _parsed(word)]
    whole = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    faults = secret_faults(_unresolved(job, whole), "multirun.yaml")
    for override in overrides:
        for value in _given(override):
            faults += secret_faults(_nested(override.key_or_group, value), "multirun.yaml")
    return list(dict.fromkeys(faults))


def _parsed(word: str) -> list[Override]:
    """The override that a word is; none where it is a flag, the value of one, or what Hydra is going to refuse."""
    if word.startswith("-") or "=" not in word:
        return []
    try:
        return [OverridesParser.create().parse_override(word)]
    except HydraException:
        return []


def _unresolved(job: str, overrides: Sequence[str]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3", job_name=job):
            config = compose(config_name=job, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException):
        return {}  # Hydra is going to report the same, before it writes anything
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def _given(override: Override) -> list[Any]:
    """The values of an override, those of a sweep one by one."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return []  # names of files, and numbers
    key = override.get_key_element()
    return [found.value() for each in override.sweep_string_iterator() for found in _parsed(f"{key}={each}")]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return cast(dict[str, Any], value)
