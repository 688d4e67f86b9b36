"""Overrides as users write them, and as Hydra takes them.

To Hydra a value is an expression: `1e3` is a number, `a,b` a sweep, `süß` an error. Here a setting whose type is text takes
the text that the shell delivers. Its value is an expression in these cases only:

- `null`, and `???`, which leaves the setting without a value
- a value in quotes of its own (`key="'a b'"` in a shell)
- `[a, b]`, where the setting takes a list; each entry is a text
- interpolations, `${key}` and `${resolver:...}`; `\\${` is a dollar and a brace
- with --multirun the commas and functions of a sweep

Values of other settings mean what Hydra defines. One that it cannot read is quoted, entry by entry in lists and mappings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from ldmscale.config import JOBS
from ldmscale.config.folders import config_folders, groups
from ldmscale.config.typed import RETIRED

_HARMLESS = re.compile(r"[\w./:*+-]*", re.ASCII)  # read as they are; spares the parser's time
_ENTRY = re.compile(r"\s*([A-Za-z_]\w*)\s*:(.*)", re.DOTALL)
_SWEEP = re.compile(r"\s*(choice|glob|interval|range|shuffle|sort|tag)\((.*)\)\s*", re.DOTALL)
_QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1(?=\s*(?:[,\])}]|$))""", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Texts:
    """How a setting takes text: one, a list, a mapping, a list of mappings, or together with true and false."""

    one: bool = False
    several: bool = False
    mapping: bool = False
    entries: Any = None  # the typed configuration of the mappings in a list
    flag: bool = False


def settle_overrides(job: str, overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """What users write, as Hydra takes it; `sweep`: with --multirun.

    `zero=3`: names of a group's files must be strings. `experiment=smoke`: an experiment that several jobs know under
    one name has a file for each of them, smoke_<job>.yaml. `unet.dropout=0.1`: a key that the typed configuration has
    may be given although the composed files leave it at its default. `text_encoder=null`: Hydra knows a group that is
    not chosen by `~text_encoder` only.
    """
    folders = config_folders(overrides)
    known_groups = groups(folders)
    return [_settled(word, job, folders, known_groups, sweep) for word in overrides]


def _settled(word: str, job: str, folders: Sequence[Path], known_groups: Sequence[str], sweep: bool) -> str:
    name, equals, value = word.partition("=")
    key = name.lstrip("+")
    if not equals or name.startswith(("-", "~")):
        return word
    if key in known_groups:
        if value == "null":
            return f"~{key}"
        return f"{name}={_each(value, sweep, lambda part: _option(key, part, job, folders))}"
    kinds = text_settings(job)
    section, _, entry = key.rpartition(".")
    if key in kinds:
        kind = kinds[key]
        value = _each(value, sweep, lambda part: _text_value(part, kind))
    elif section in kinds and kinds[section].mapping:  # cluster.environment.NAME=VALUE
        value = _each(value, sweep, _text)
    elif key in (known := typed_settings(job)) or key in RETIRED:
        value = _taken(value)
    elif section in known and entry:
        value = _taken(value)
        if get_origin(known[section]) is not dict:
            return f"{name}={value}"
    else:
        return word
    return f"++{key}={value}" if "." in key else f"{name}={value}"


def _option(group: str, value: str, job: str, folders: Sequence[Path]) -> str:
    """The choice of a group, which is the name of a file whatever it looks like."""
    if group == "experiment" and any(
        (folder / group / f"{value}_{job}.yaml").is_file() for folder in folders
    ):
        value = f"{value}_{job}"
    found = _parsed(value)
    return value if isinstance(found, (str, QuotedString, list, dict)) else quoted(value)


def _each(value: str, sweep: bool, taken: Callable[[str], str]) -> str:
    """`value` as `taken` makes it; the parts of a sweep one by one."""
    if not sweep:
        return taken(value)
    if call := _SWEEP.fullmatch(value):
        return f"choice({_each(call[2], True, taken)})" if call[1] == "choice" else value
    parts = _parts(value)
    return taken(value) if len(parts) == 1 else ",".join(taken(part.strip()) for part in parts)


def typed_keys(kind: Any, path: str = "") -> list[str]:
    """Dotted names of all settings of a typed configuration, those of sections that may be null among them."""
    return list(_typed(kind, path))


def typed_settings(job: str) -> dict[str, Any]:
    """The type of every setting of a job, by its dotted name."""
    return _typed_of(job)


@cache
def _typed_of(job: str) -> dict[str, Any]:
    return _typed(JOBS[job])


def _typed(kind: Any, path: str = "") -> dict[str, Any]:
    sections = [part for part in (kind, *members(kind)) if is_dataclass(part)]
    if not sections:
        return {path: kind}
    found: dict[str, Any] = {}
    for section in sections:
        types = get_type_hints(section, include_extras=True)
        for f in fields(section):
            for key, type_ in _typed(types[f.name], f"{path}.{f.name}" if path else f.name).items():
                found.setdefault(key, type_)
    return found


def text_settings(job: str) -> dict[str, Texts]:
    """The settings of a job that take text, and how."""
    return _text_settings(job)


@cache
def _text_settings(job: str) -> dict[str, Texts]:
    found = {key: _texts(type_) for key, type_ in typed_settings(job).items()}
    return {key: kind for key, kind in found.items() if kind is not None}


def _texts(type_: Any) -> Texts | None:
    kinds = [part for part in members(type_) if part is not type(None)]
    lists = [get_args(part)[0] for part in kinds if get_origin(part) in (tuple, list) and get_args(part)]
    inner = [members(part) for part in lists]
    kind = Texts(
        one=str in kinds,
        several=[str] in inner,
        mapping=any(get_origin(part) is dict and get_args(part)[1] is str for part in kinds),
        entries=next((part for part in lists if is_dataclass(part)), None),
        flag=bool in kinds,
    )
    return kind if kind.one or kind.several or kind.mapping else None


def members(type_: Any) -> list[Any]:
    """Returns the members of a union, without annotations."""
    if get_origin(type_) is Annotated:
        return members(get_args(type_)[0])
    if is_dataclass(type_) or (get_origin(type_) is not None and not _is_union(type_)):
        return [type_]
    return [member for part in get_args(type_) for member in members(part)] if _is_union(type_) else [type_]


def _is_union(type_: Any) -> bool:
    from types import UnionType
    from typing import Union

    return get_origin(type_) in (Union, UnionType)


def _text_value(value: str, kind: Texts) -> str:
    bare = value.strip()
    if (kind.several or kind.entries) and bare[:1] == "[" and _closes_last(bare):
        entries = [part.strip() for part in _parts(bare[1:-1])] if bare[1:-1].strip() else []
        return f"[{','.join(_listed(entry, kind) for entry in entries)}]"
    if kind.flag and bare.lower() in ("true", "false"):
        return bare
    if kind.mapping:
        return _mapping(bare, None) or value
    if kind.one or value in ("", "null", "???"):
        return _text(value)
    return (
        value if len(_parts(value)) > 1 or "(" in value else f"[{_text(bare)}]"
    )  # one entry needs no brackets


def _listed(entry: str, kind: Texts) -> str:
    return (_mapping(entry, kind.entries) if kind.entries else None) or _text(entry)


def _mapping(text: str, section: Any) -> str | None:
    """`{key: value, ...}` with its texts quoted; None where it is no mapping. `section`: the type of its values."""
    if text[:1] != "{" or not _closes_last(text):
        return None
    found = [_ENTRY.fullmatch(part) for part in _parts(text[1:-1])] if text[1:-1].strip() else []
    entries = [entry for entry in found if entry]
    if len(entries) < len(found):
        return None
    types = get_type_hints(section, include_extras=True) if section else {}

    def taken(name: str, value: str) -> str:
        kind = _texts(types[name]) if name in types else None if section else Texts(one=True)
        return _text_value(value, kind) if kind else _taken(value)

    return "{" + ", ".join(f"{entry[1]}: {taken(entry[1], entry[2].strip())}" for entry in entries) + "}"


def _text(value: str) -> str:
    return value if _is_expression(value) else quoted(_interpolated(value))


def _is_expression(value: str) -> bool:
    return value in ("", "null", "???") or isinstance(_parsed(value), QuotedString)


def _interpolated(text: str) -> str:
    """`text` with its braces behind dollars escaped where they are no interpolation."""
    if "${" not in text:
        return text
    try:
        parse(text)
    except GrammarParseError:
        return _escaped(text)
    return text


def _escaped(text: str) -> str:
    # OmegaConf halves the backslashes in front of ${ and no others.
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def quoted(text: str) -> str:
    """`text` in Hydra's quotes; interpolations in it stay what they are."""
    # A backslash is itself, but before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def setting(key: str, value: int | str | Path) -> str:
    """The override that gives `key` this value, whatever a text contains."""
    text = str(value)
    if isinstance(value, int) or (_HARMLESS.fullmatch(text) and isinstance(_parsed(text), str)):
        return f"{key}={text}"
    return f"{key}={quoted(_escaped(text))}"


def text_of(value: str) -> str:
    """The text that a value of a text setting stands for, without Hydra's quotes."""
    found = _parsed(value)
    return found.text if isinstance(found, QuotedString) else value


def plain(override: str) -> str:
    """An override `key=value` as Hydra takes it: its value quoted where Hydra could not read it."""
    key, equals, value = override.partition("=")
    return f"{key}={_taken(value)}" if equals else override


def _taken(value: str) -> str:
    if _readable(value):
        return value
    text = value.strip()
    if text[:1] == "[" and text[-1:] == "]":
        return f"[{','.join(_taken(part.strip()) for part in _parts(text[1:-1]))}]"
    if text[:1] == "{" and text[-1:] == "}":
        entries = [_ENTRY.fullmatch(part) for part in _parts(text[1:-1])]
        found = [f"{entry[1]}: {_taken(entry[2].strip())}" for entry in entries if entry]
        if len(found) == len(entries):
            return "{" + ", ".join(found) + "}"
    return quoted(value)


def _parts(text: str) -> list[str]:
    """Text cut at the commas that stand in no brackets and in no quotes."""
    closed = _closed(text)
    parts, place = [""], 0
    while place < len(text):
        if text[place] == "," and place not in closed:
            parts.append("")
            place += 1
            continue
        end = closed.get(place, place)
        parts[-1] += text[place : end + 1]
        place = end + 1
    return parts


def _closes_last(text: str) -> bool:
    """Whether the bracket that `text` begins with is closed by its last letter."""
    return len(text) > 1 and _closed(text).get(0) == len(text) - 1


def _closed(text: str) -> dict[int, int]:
    """Where each bracket and quoted entry that begins in `text` ends. A bracket without its partner is a letter."""
    found: dict[int, int] = {}
    open_: list[int] = []
    place, before = 0, ""
    while place < len(text):
        letter = text[place]
        if before in ("", *_OPEN, ",", ":") and (entry := _QUOTED.match(text, place)):
            found[place] = entry.end() - 1
            place, letter = found[place], "'"
        elif letter in _OPEN:
            open_.append(place)
        elif letter in _CLOSE:
            partners = [at for at in open_ if text[at] == _OPEN[_CLOSE.index(letter)]]
            if partners:
                found[partners[-1]] = place
                open_ = [at for at in open_ if at < partners[-1]]
        before = before if letter.isspace() else letter
        place += 1
    return found


def _readable(value: str) -> bool:
    return _HARMLESS.fullmatch(value) is not None or not isinstance(_parsed(value), HydraException)


def _parsed(value: str) -> Any:
    """What Hydra reads: a QuotedString for a value in quotes, otherwise the value; the error where it reads none."""
    try:
        found = _parser().parse_override(f"x={value}")
    except HydraException as error:
        return error
    return found._value


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
