"""Json of others: what cannot be parsed or kept is a DataError of its sample, wherever it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ldmscale.data.conditions.annotations import ClassLabels, caption_of, raw_label
from ldmscale.data.conditions.boxes import raw_boxes, size_told
from ldmscale.data.conditions.record import parse_record
from ldmscale.data.shards.selection import Selection
from ldmscale.errors import DataError

HOSTILE = {
    "nested": b"[" * 200_000,
    "nested and whole": b"[" * 900 + b"]" * 900,
    "nested objects": b'{"k": ' * 65 + b"1" + b"}" * 65,
    "no UTF-8": b'\xff{"k": "x"}',
    "UTF-16": '{"k": "x"}'.encode("utf-16"),
    "5000 digits": b'{"k": ' + b"9" * 5000 + b"}",
    "cut": b'{"k": "x',
    "empty": b"",
}
Reads = Callable[[Mapping[str, bytes]], Any]
READERS: dict[str, Reads] = {
    "record": lambda members: parse_record(members["json"]),
    "caption": lambda members: caption_of(members, "json:k"),
    "label": lambda members: raw_label(members, "json:k"),
    "boxes": lambda members: raw_boxes(members, "json:k"),
    "size": size_told,
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_no_record_is_a_fault_of_its_sample(read: Reads, record: bytes) -> None:
    with pytest.raises(DataError, match="json") as error:
        read({"json": record})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_a_filter_takes_no_sample_without_a_record(record: bytes) -> None:
    chosen = Selection(filter="k > 1").judge({"json": record}.get, lambda: pytest.fail("no image"))
    assert chosen == (0, "filter_unknown")


def test_records_as_deep_as_is_allowed_are_taken() -> None:
    deep = parse_record(b"[" * 64 + b"]" * 64)
    for _ in range(63):
        (deep,) = deep
    assert deep == []
    assert len(parse_record(b"[" + b'{"class": 1},' * 1000 + b"{}]")) == 1001  # many, none of them deep
    assert parse_record(b'\xef\xbb\xbf{"k": 1}') == {"k": 1}


@pytest.mark.parametrize(
    ("read", "member", "data"),
    [
        (READERS["caption"], "json", b'{"k": "a \\ud83d b"}'),
        (READERS["label"], "json", b'{"k": "\\udc00"}'),
        (READERS["size"], "json", b'{"width": 1e999, "height": 4}'),
        (READERS["boxes"], "json", b'{"k": [{"class": 1, "box": [0, 0, 1, 1' + b"0" * 400 + b"]}]}"),
        (READERS["boxes"], "json", b'{"k": [{"class": 1, "box": [0, 0, 1, NaN]}]}'),
        (ClassLabels("cls", 10).of, "cls", b"9" * 5000),
        (ClassLabels("cls", 10).of, "cls", b"\xff"),
        (ClassLabels("json:k", 10).of, "json", b'{"k": 1' + b"0" * 4000 + b"}"),
    ],
    ids=["caption", "label", "infinite size", "huge corner", "NaN", "5000 digits", "no UTF-8", "4001 digits"],
)
def test_values_that_cannot_be_kept_are_a_fault_of_their_sample(
    read: Reads, member: str, data: bytes
) -> None:
    with pytest.raises(DataError):
        read({member: data})
