"""Captions from text members and json keys."""

from __future__ import annotations

import json

import pytest

from ldmscale.data.conditions.annotations import caption_member, caption_of, check_source
from ldmscale.errors import ConfigError, DataError


def test_captions_come_from_text_or_a_json_key_with_single_spaces() -> None:
    record = json.dumps({"alt": " from\tjson  key ", "n": 1}).encode()
    assert caption_of({"txt": "\ufeff a  café\n".encode()}) == "a café"
    assert caption_of({"txt": b"no", "json": record}, "json:alt") == "from json key"
    assert (caption_member("txt"), caption_member("json:alt")) == ("txt", "json")


@pytest.mark.parametrize(
    ("members", "source", "reason"),
    [
        ({"jpg": b""}, "txt", r"no txt member.*members: jpg"),
        ({"txt": b"caf\xe9"}, "txt", "not UTF-8: byte 3 is 0xe9"),
        ({"txt": b" \n"}, "txt", "is empty"),
        ({"json": b"{"}, "json:alt", "no valid json"),
        ({"json": b'{"url": "x", "alt": null}'}, "json:alt", "has null under 'alt'; expected a text"),
        ({"json": b'{"alt": ["a", "b"]}'}, "json:alt", "has a list under 'alt'; expected a text"),
        ({"json": b'{"url": "x"}'}, "json:alt", r"no text under 'alt' \(it has: url\)"),
        ({"json": b"[]"}, "json:alt", "no text under 'alt'"),
    ],
)
def test_what_is_no_caption_gives_the_reason(members: dict[str, bytes], source: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        caption_of(members, source)


def test_unknown_sources_are_refused() -> None:
    check_source("txt")
    check_source("json:alt")
    for wrong in ("json", "json:", "caption"):
        with pytest.raises(ConfigError, match=r"data\.caption"):
            check_source(wrong)
