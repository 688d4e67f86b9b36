"""Parses the json of a sample. What cannot be parsed is a fault of that sample, never the end of a job.

Values that are parsed go on: into tars of latents, other processes and messages. Each of these descends into what it is
given, so that nesting is limited here, once.
"""

from __future__ import annotations

import json
from typing import Any

from ldmscale.errors import DataError

_DEEPEST = 64


def parse_record(data: bytes | str) -> Any:
    """The value of a sample's json.

    Raises:
        DataError: if it is no json, or nested more than 64 deep.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text)
    except RecursionError:
        raise DataError(_nesting()) from None
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise DataError(f"the json member is no valid json: {error}") from error
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise DataError(_nesting())
    return value


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it: json can escape one half of a surrogate pair, which is no character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _nesting() -> str:
    return f"the json member is no valid json: it is nested more than {_DEEPEST} deep"


def _depth(value: Any) -> int:
    """How deep lists and mappings stand in each other; stops a level beyond what is allowed."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth
