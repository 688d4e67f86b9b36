"""Keeps secrets out of everything that is written or shown: the one place that decides what a secret is.

Three kinds are secrets: the value of a key that is named like a credential (`key`, `secret`, `token`, `password`,
`client_kwargs`, ...); user-info and query of a URL (presigned URLs carry their signature there); and what an
environment interpolation `${oc.env:NAME}` resolved to. The first two are replaced by "***". The third is replaced by
the interpolation itself, so that a process whose environment has NAME can resolve it again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SHORTEST = (
    6  # characters; shorter values are replaced in configurations, but not wherever they occur in a text
)

_CREDENTIAL = re.compile(
    r"(^|_)(key|pass|pwd|auth|authorization|signature|cookie|sas|token)(_|$)"
    r"|secret|passw|passphrase|credential|connection_string|(api|access|account|private)key|token$"
)
_CONTAINERS = ("client_kwargs", "headers", "storage_options")  # all strings in them count, but for these:
_HARMLESS = ("endpoint_url", "region_name", "api_version", "use_ssl", "verify")

_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.\-]*://)([^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?")
_INTERPOLATION = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")

_texts: dict[str, str] = {}  # secret -> what is shown in its place
_leaves: dict[tuple[str, str], str] = {}  # (dotted key, resolved value) -> the value with its interpolations


def register(values: Any, key: str = "") -> None:
    """Remembers the credentials in a configuration, so that `text` finds them in messages of any library."""
    for _, name, value in _strings(values, key, named=False):
        if name and len(value) >= _SHORTEST and not _INTERPOLATION.fullmatch(value):
            _texts[value] = HIDDEN
        if "://" in value:
            for match in _URL.finditer(value):
                password = (match[2] or "").rstrip("@").partition(":")[2]
                query = [pair.partition("=")[2] for pair in (match[4] or "")[1:].split("&") if "=" in pair]
                if _hides_query(match):
                    _texts.update({part: HIDDEN for part in query if len(part) >= _SHORTEST})
                if len(password) >= _SHORTEST:
                    _texts[password] = HIDDEN


def register_environment(written: Any, resolved: Any, variables: Mapping[str, str], key: str = "") -> None:
    """Remembers which values of a configuration came from environment variables.

    Args:
        written: the configuration before its interpolations were resolved.
        resolved: the same configuration afterwards.
        variables: the environment variables that resolving it read, with their values.
    """
    for name, value in variables.items():
        if len(value) >= _SHORTEST:
            _texts.setdefault(value, f"${{oc.env:{name}}}")
    _register_leaves(written, resolved, sorted(variables.items(), key=lambda pair: -len(pair[1])), key)


def _register_leaves(written: Any, resolved: Any, variables: list[tuple[str, str]], key: str) -> None:
    interpolated = isinstance(written, str) and "${" in written
    if isinstance(resolved, Mapping):
        for name, value in resolved.items():
            inner = written if interpolated else written.get(name) if isinstance(written, Mapping) else None
            _register_leaves(inner, value, variables, _dotted(key, name))
    elif isinstance(resolved, (list, tuple)):
        for number, value in enumerate(resolved):
            inner = written if interpolated else written[number] if isinstance(written, list) else None
            _register_leaves(inner, value, variables, _dotted(key, number))
    elif isinstance(resolved, str) and interpolated:
        kept = resolved
        for name, value in variables:
            if value and (value == resolved or len(value) >= 3):
                kept = kept.replace(value, f"${{oc.env:{name}}}")
        if kept != resolved:
            _leaves[key, resolved] = kept


def config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as files may keep it. Values that are no secrets, and all types, are as before."""
    return {name: _kept(value, str(name), False) for name, value in values.items()}


def _kept(value: Any, key: str, named: bool) -> Any:
    name = key.rpartition(".")[2]
    named = False if name in _HARMLESS else named or is_credential(name)
    if isinstance(value, Mapping):
        inner = named or name in _CONTAINERS
        return {part: _kept(each, _dotted(key, part), inner) for part, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_kept(each, _dotted(key, number), named) for number, each in enumerate(value)]
    if isinstance(value, str) and (key, value) in _leaves:
        return _leaves[key, value]
    if named and value is not None and not isinstance(value, bool) and value != "":
        return value if isinstance(value, str) and _INTERPOLATION.search(value) else HIDDEN
    return url(value) if isinstance(value, str) and "://" in value else value


def is_credential(name: str) -> bool:
    """Whether a key is named like a credential: `secret`, `aws_access_key_id`, `sasToken`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    return _CREDENTIAL.search(words) is not None


def lost(values: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values `config` hides for good: given in plain, they are in no file that a later process reads."""
    kept = config(values)
    before = {key: value for key, _, value in _strings(values, "", named=False)}
    after = {key: value for key, _, value in _strings(kept, "", named=False)}
    return [key for key, value in before.items() if value != after.get(key) and HIDDEN in str(after.get(key))]


def resolve(values: Any, key: str = "") -> Any:
    """The opposite of `config` for environment interpolations; variables that are not set stay as they are written."""
    if isinstance(values, Mapping):
        return {name: resolve(value, _dotted(key, name)) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [resolve(value, _dotted(key, number)) for number, value in enumerate(values)]
    if not isinstance(values, str) or "${oc.env:" not in values:
        return values
    found = {name: os.environ[name] for name in _INTERPOLATION.findall(values) if name in os.environ}
    resolved = _INTERPOLATION.sub(lambda match: found.get(match[1], match[0]), values)
    register_environment(values, resolved, found, key)
    return resolved


def unresolved(values: Any) -> list[str]:
    """Environment variables that a configuration names and that are not set here."""
    names = {
        name for _, _, value in _strings(values, "", named=False) for name in _INTERPOLATION.findall(value)
    }
    return sorted(names - os.environ.keys())


def url(given: str) -> str:
    """A URL, or a text with URLs in it, without user-info and query."""
    return _URL.sub(_without_secrets, given)


def _without_secrets(match: re.Match[str]) -> str:
    scheme, user, place, query = match.groups()
    shown = f"{scheme}{HIDDEN + '@' if user else ''}{place}"
    if query is None or not _hides_query(match):
        return shown + (query or "")
    return f"{shown}?{HIDDEN}"


def _hides_query(match: re.Match[str]) -> bool:
    """A `?` in a pattern of an object store stands for any character; a query of it has a name and a value."""
    return bool(match[4]) and (match[1].startswith("http") or "=" in match[4])


def text(given: str) -> str:
    """A message without secrets: those of URLs, and all that were registered."""
    if _texts and any(secret in given for secret in _texts):
        for secret in sorted(_texts, key=len, reverse=True):
            given = given.replace(secret, _texts[secret])
    return url(given) if "://" in given else given


def known() -> dict[str, str]:
    """What is registered for texts, to be handed to another process: see `know`."""
    return dict(_texts)


def know(texts: Mapping[str, str]) -> None:
    """Registers what another process has registered."""
    _texts.update(texts)


def _strings(values: Any, key: str, *, named: bool) -> list[tuple[str, bool, str]]:
    """(dotted key, whether it is a credential, value) of each leaf that is a text or a number under a credential's key."""
    name = key.rpartition(".")[2]
    named = False if name in _HARMLESS else named or is_credential(name)
    if isinstance(values, Mapping):
        inner = named or name == "headers"
        return [
            found
            for part, value in values.items()
            for found in _strings(value, _dotted(key, part), named=inner)
        ]
    if isinstance(values, (list, tuple)):
        return [
            found
            for number, value in enumerate(values)
            for found in _strings(value, _dotted(key, number), named=named)
        ]
    if isinstance(values, str) or (named and values is not None and not isinstance(values, bool)):
        return [(key, named, str(values))]
    return []


def _dotted(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
