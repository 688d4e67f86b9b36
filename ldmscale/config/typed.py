"""From composed values to the typed configuration and back, with every fault of types and names at once.

Checks that need more than one key, or a look at the disk, are in `checks/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from ldmscale.config import JOBS, Job
from ldmscale.errors import ConfigError

# Settings that took null only, with what is given in their place. Files and commands of earlier versions may name them.
RETIRED = {
    "unet.num_classes": "labels enter by cross-attention, as published: remove it, and give class_embedder=...",
}
MISSING = "???"  # what OmegaConf leaves where a mandatory value was not given
# Parts of pydantic's locations that name the branch of a union and no key; the last are kinds of text encoders
_BRANCHES = ("str", "int", "float", "bool", "bert", "clip", "t5")
_T = TypeVar("_T")


def read(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Turn plain values into the typed configuration `kind`.

    Raises ConfigError with every missing, unknown and ill-typed key at once.
    """
    values = _without_retired(_settle_job_choice(kind, values))
    faults = set(_missing(values))
    try:
        result = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        faults |= {_fault(dict(e)) for e in error.errors(include_url=False)}
    if faults:
        raise ConfigError(sorted(faults))
    return result


def plain(config: Job) -> dict[str, Any]:
    """The configuration as plain values, ready for YAML or JSON."""
    return plain_part(config)


def plain_part(part: object) -> dict[str, Any]:
    """One section of a configuration as plain values."""
    return cast(dict[str, Any], _lists(asdict(cast(Any, part))))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys (dotted) whose values differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key, MISSING), new.get(key, MISSING)
        where = f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, where + ".")
        elif a != b:
            found[where] = (a, b)
    return found


def _settle_job_choice(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    name = next((name for name, job in JOBS.items() if job is kind), None)
    return {"job": name, **values} if name else dict(values)


def _without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for section, name in (key.split(".") for key in RETIRED):
        part = found.get(section)
        if isinstance(part, Mapping) and part.get(name, MISSING) is None:
            found[section] = {key: value for key, value in part.items() if key != name}
    return found


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def _missing(values: Any, path: str = "") -> list[str]:
    if isinstance(values, Mapping):
        return [
            fault
            for key, value in values.items()
            for fault in _missing(value, f"{path}.{key}" if path else str(key))
        ]
    return [_missing_fault(path)] if values == MISSING else []


def _missing_fault(path: str) -> str:
    return f"{path} is not set: it has no default; give {path}=..."


def _fault(error: Mapping[str, Any]) -> str:
    # pydantic appends the branch of a union ("str", "tuple[...]") to the location: keys have no such characters.
    parts = [str(p) for p in error["loc"]]
    path = ".".join(p for p in parts if (p.isidentifier() and p not in _BRANCHES) or p.isdigit())
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path} is unknown: {RETIRED.get(path, 'remove it, or see the keys with --cfg job')}"
    if error["type"] in ("missing", "missing_argument") or error.get("input") == MISSING:
        return _missing_fault(path)
    found = f"{path}={error.get('input')!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "string_type" and isinstance(error.get("input"), (int, float)):
        found += f"; in a YAML file a text that looks like a number or like yes and no needs quotes ({path.split('.')[-1]}: '...')"
    return found
