"""Annotations of a sample that are read from its members: caption, class label, embeddings.

A caption is a text member or a key of the sample's json. A class label is a number, or a name that a list turns into a
number. Embeddings are arrays, such as those of an image's neighbours (retrieval-augmented models).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from ldmscale.data.conditions.record import is_text, parse_record
from ldmscale.data.images.decode import decode_array
from ldmscale.errors import ConfigError, DataError
from ldmscale.storage.atomic import write_file
from ldmscale.storage.plain_values import Count, checked, parsed_object

CAPTIONS_MEMBER = "sample.json"
"""Member of a latent (version 2) that keeps the captions of its source's text members."""


def check_source(source: str) -> None:
    """Checks where captions are to come from.

    Raises:
        ConfigError: if `source` is neither "txt" nor "json:KEY" nor "captions:NAME".
    """
    if not is_source(source):
        raise ConfigError(
            f"data.caption must be 'txt', 'json:KEY' or (of latents) 'captions:NAME', got {source!r}"
        )


def is_source(source: str) -> bool:
    """Whether a caption can come from there: "txt", "json:KEY", "captions:NAME"."""
    kind, _, key = source.partition(":")
    return source == "txt" or (kind in ("json", "captions") and key != "")


def caption_member(source: str) -> str:
    """Extension of the member that holds the caption: "txt", "json", or that of the record of a latent."""
    kind = source.split(":", 1)[0]
    return CAPTIONS_MEMBER if kind == "captions" else kind


def caption_of(members: Mapping[str, bytes], source: str = "txt") -> str:
    """Returns a sample's caption with runs of white space made single spaces.

    Args:
        members: extension to bytes, as `samples.Sample.members`.
        source: "txt", "json:KEY" for a key of the sample's json, or "captions:NAME" for one of the captions that a latent
            keeps of the text members of its source.

    Raises:
        DataError: if the member or the key is missing, not UTF-8, or empty.
    """
    member = caption_member(source)
    if member not in members:
        raise DataError(
            f"has no {member} member for the caption (members: {', '.join(sorted(members)) or 'none'})"
        )
    return caption_in(members[member], source)


def caption_in(data: bytes, source: str = "txt") -> str:
    """The caption in the bytes of the member that holds it. As `caption_of`."""
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the caption ({caption_member(source)}) is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    if source.startswith("captions:"):
        record = parse_record(text)
        captions = record.get("captions") if isinstance(record, dict) else None
        text = _json_caption(captions, source.split(":", 1)[1])
    elif source != "txt":
        text = _json_caption(parse_record(text), source.split(":", 1)[1])
    caption = " ".join(text.split())
    if not caption:
        raise DataError(f"the caption ({source}) is empty")
    if not is_text(caption):
        raise DataError(f"the caption ({source}) is no text: it has one half of a surrogate pair")
    return caption


def _json_caption(record: object, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        if isinstance(record, dict) and key in record:
            kind = {list: "a list", dict: "an object", type(None): "null", bool: "true or false"}.get(
                type(value), "a number"
            )
            raise DataError(f"the json member has {kind} under {key!r}; expected a text")
        known = ", ".join(sorted(record)[:20]) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"the json member has no text under {key!r} (it has: {known})")
    return value


class _Classes(BaseModel):
    source: str
    count: Count
    names: list[str] | None


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
        number = int(label) if isinstance(label, int) or len(label) < 20 else -1
        if not 0 <= number < self.count:
            raise DataError(f"the label {label} is out of range: there are {self.count} classes")
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
        """What `save` wrote. Raises DataError if it is not there, or damaged."""
        try:
            found = checked(_Classes, parsed_object(path.read_bytes()))
            if found.names is not None and len(found.names) > found.count:
                raise ValueError(f"found {len(found.names)} names of {found.count} classes")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): restore it from a copy, or from the run's checkpoint.url"
            ) from error
        return cls(found.source, found.count, None if found.names is None else tuple(found.names))


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
        data = members[member]
        value = parse_record(data)[key] if member == "json" else data.decode("utf-8-sig").strip()
    except DataError as error:
        raise DataError(f"its label ({source}) cannot be read: {error}") from error
    except (UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"its label ({source}) cannot be read: {type(error).__name__} {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "" or not is_text(str(value)):
        raise DataError(f"its label ({source}) is {value!r}; expected a whole number or a name")
    return value


@dataclass(frozen=True)
class GivenEmbeddings:
    """Reads a context. A value, so that loading processes can have it.

    Attributes:
        member: of the sample, such as "embeddings.npy": [L, width], L from 1 to max_tokens, floats.
        width: D. max_tokens: rows of the result.
    """

    member: str
    width: int
    max_tokens: int

    def of(self, members: Mapping[str, bytes]) -> np.ndarray:
        """float32 [max_tokens, width], zeros behind the sample's own rows, as they stand for no embedding.

        Raises:
            DataError: if there are none, or of another shape, or some that are not finite.
        """
        if self.member not in members:
            raise DataError(
                f"has no {self.member} member for the embeddings (members: {', '.join(sorted(members)) or 'none'})"
            )
        try:
            found = decode_array(members[self.member])
        except DataError as error:
            raise DataError(f"its embeddings ({self.member}) are no array of finite floats") from error
        if found.ndim != 2 or found.shape[1] != self.width or not 1 <= found.shape[0] <= self.max_tokens:
            raise DataError(
                f"its embeddings ({self.member}) have shape {found.shape}; expected 1 to {self.max_tokens} rows of "
                f"{self.width}"
            )
        if found.dtype.kind != "f":
            raise DataError(f"its embeddings ({self.member}) are {found.dtype}; expected floats")
        whole = np.zeros((self.max_tokens, self.width), dtype=np.float32)
        with np.errstate(over="ignore"):  # said below
            whole[: len(found)] = found
        if not np.isfinite(whole).all():
            raise DataError(f"its embeddings ({self.member}) are not all finite")
        return whole
