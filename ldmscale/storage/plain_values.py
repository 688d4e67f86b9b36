"""JSON and other plain values of files that another process or person may have written: parsed and checked in one place.

A checkpoint, an index, a run folder or a lease can come from anywhere. `parsed` bounds nesting, `checked` compares types and
ranges with a description that pydantic understands. Both raise ValueError with what was found; callers add the file and the
remedy, as an error of their kind. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from ldmscale.storage.names import shown

_T = TypeVar("_T")

Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
"""A whole number that fits a file's offset; neither a text nor true or false."""
Flag = Annotated[bool, Field(strict=True)]

MOST_LEVELS = 100
MOST_VALUES = 10_000_000
"""Values with their repetitions: a YAML file of a few lines can refer to one list a billion times."""


def parsed(content: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or is nested too deep."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels") from None
    return bounded(value)


def parsed_object(content: str | bytes) -> dict[str, Any]:
    """As `parsed`, of a JSON object. Raises ValueError where it is another value."""
    value = parsed(content)
    if not isinstance(value, dict):
        raise ValueError(f"found {shown(value)}, expected an object with names")
    return value


def bounded(value: Any) -> Any:
    """Returns `value` if it can be walked through. Raises ValueError where it is nested too deep or repeats itself too often."""
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                below.extend(item.values() if isinstance(item, dict) else item)
                if count + len(below) > MOST_VALUES:
                    raise ValueError(f"it has more than {MOST_VALUES} values")
        level = below
    return value


def checked(kind: type[_T], value: Any) -> _T:
    """`value` as a `kind`. Raises ValueError with the place, what was found and what was expected there."""
    try:
        found: _T = _adapter(cast(Hashable, kind)).validate_python(value)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(shown(part).strip("'") for part in first["loc"]) or "the whole"
        raise ValueError(f"{place}: found {shown(first['input'])}; {first['msg']}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
