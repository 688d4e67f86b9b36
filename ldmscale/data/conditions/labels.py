"""The class of a sample: a number, or a name that a list makes a number of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldmscale.errors import DataError
from ldmscale.storage.atomic import write_file


@dataclass(frozen=True)
class ClassLabels:
    """Reads labels of 0 to count - 1. A value, so that loading processes can have it.

    Attributes:
        source: "cls" (a member with the number or name as text) or "json:KEY".
        count: of classes.
        names: of the classes in their order; None where labels are numbers.
    """

    source: str
    count: int
    names: tuple[str, ...] | None = None

    def of(self, members: Mapping[str, bytes]) -> int:
        """The label of a sample.

        Raises:
            DataError: if it has none, or one that is no class.
        """
        return self.number(raw_label(members, self.source))

    def number(self, label: int | str) -> int:
        """A class number as it is, checked; a name as its number; digits as the number that they write.

        Raises:
            DataError: if there is no such class.
        """
        if isinstance(label, str) and self.names is not None and label in self.names:
            return self.names.index(label)
        if isinstance(label, str) and not label.isdecimal():
            known = "they are numbers" if self.names is None else ", ".join(self.names[:8])
            raise DataError(f"there is no class {label!r} among the {self.count} ({known} ...)")
        number = int(label)
        if not 0 <= number < self.count:
            raise DataError(f"the label {number} is out of range: there are {self.count} classes")
        return number

    def title(self, number: int) -> str:
        """What a picture of the class is called."""
        return str(number) if self.names is None else self.names[number]

    def save(self, path: Path) -> None:
        """Writes the classes, in their order, for whoever loads the model."""
        record = {"source": self.source, "count": self.count, "names": self.names}
        write_file(path, json.dumps(record, indent=1, ensure_ascii=False).encode("utf-8"))

    @classmethod
    def load(cls, path: Path) -> ClassLabels:
        """What `save` wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        names = None if record["names"] is None else tuple(record["names"])
        return cls(record["source"], record["count"], names)


def raw_label(members: Mapping[str, bytes], source: str) -> int | str:
    """The label as the sample has it.

    Args:
        members: extension to bytes, as `samples.Sample.members`.
        source: "cls" or "json:KEY".

    Raises:
        DataError: if it is missing, or neither a whole number nor a text.
    """
    member, _, key = source.partition(":")
    if member not in members:
        raise DataError(
            f"has no {member} member for the label (members: {', '.join(sorted(members)) or 'none'})"
        )
    try:
        text = members[member].decode("utf-8-sig")
        value = json.loads(text)[key] if member == "json" else text.strip()
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"its label ({source}) cannot be read: {type(error).__name__} {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise DataError(f"its label ({source}) is {value!r}; expected a whole number or a name")
    return value
