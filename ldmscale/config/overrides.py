"""Values on the command line that Hydra's grammar has no place for, taken as the text that they are.

To Hydra braces, `=`, `#`, a lone quote and more are syntax, so it refuses `data.shards=/data/{00000..00009}.tar`,
`data.shards=https://host/a.tar?key=1` and `run.dir=runs/a(1)`. What it cannot read is quoted here, entry by entry in lists
and mappings. What it can read means what Hydra says.
"""

from __future__ import annotations

import re
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_HARMLESS = re.compile(r"[\w./:*+-]*")  # read as they are; spares the parser's time
_ENTRY = re.compile(r"\s*([A-Za-z_]\w*)\s*:(.*)", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"


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
    # A backslash is itself, but before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _parts(text: str) -> list[str]:
    """Text cut at the commas that stand in no bracket and in no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        elif letter in _OPEN + _CLOSE:
            depth += 1 if letter in _OPEN else -1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _readable(value: str) -> bool:
    if _HARMLESS.fullmatch(value):
        return True
    try:
        _parser().parse_override(f"x={value}")
    except HydraException:
        return False
    return True


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
