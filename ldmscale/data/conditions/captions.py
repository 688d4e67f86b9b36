"""The caption of a sample: a text member, or a key of its json."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping

from ldmscale.errors import ConfigError, DataError


def check_source(source: str) -> None:
    """Checks where captions are to come from.

    Raises:
        ConfigError: if `source` is neither "txt" nor "json:KEY".
    """
    if source != "txt" and not (source.startswith("json:") and len(source) > len("json:")):
        raise ConfigError(f"data.caption must be 'txt' or 'json:KEY', got {source!r}")


def caption_member(source: str) -> str:
    """Extension of the member that holds the caption: "txt" or "json"."""
    return source.split(":", 1)[0]


def caption_of(members: Mapping[str, bytes], source: str = "txt") -> str:
    """Returns a sample's caption with runs of white space made single spaces.

    Args:
        members: extension to bytes, as `samples.Sample.members`.
        source: "txt", or "json:KEY" for a key of the sample's json.

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
    if source != "txt":
        text = _json_caption(text, source.split(":", 1)[1])
    caption = " ".join(text.split())
    if not caption:
        raise DataError(f"the caption ({source}) is empty")
    return caption


def _json_caption(text: str, key: str) -> str:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"the json member is no valid json: {error}") from error
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"the json member has no text under {key!r} (it has: {known})")
    return value
