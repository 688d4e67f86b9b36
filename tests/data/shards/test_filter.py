"""Conditions on a sample's json mean what they say, and nothing is ever evaluated as Python."""

from __future__ import annotations

import pickle

import pytest

from ldmscale.config.compose import compose_job
from ldmscale.data.shards.filter import Condition
from ldmscale.errors import ConfigError

RECORD = {
    "similarity": 0.4,
    "width": 512,
    "height": 256,
    "caption": "a red fox",
    "punsafe": None,
    "NSFW": "UNLIKELY",
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("similarity > 0.3 and width >= 256", True),
        ("similarity > 0.3 and width < 256", False),
        ("not similarity > 0.3 or height == 256", True),
        ("0.3 < similarity <= 0.4", True),
        ("width / height == 2 and width - height > -1 and width * height + 1 > 100000", True),
        ("'fox' in caption and 'cat' not in caption", True),
        ("NSFW in ['UNLIKELY', 'UNSURE']", True),
        ('json["NSFW"] == "UNLIKELY"', True),
        ("punsafe < 0.5", None),  # null is unknown
        ("absent < 0.5", None),
        ("not absent < 0.5", None),
        ("absent < 0.5 or width == 512", True),  # settled whatever the unknown is
        ("absent < 0.5 and width == 511", False),
        ("absent is None and width is not None", True),
        ("caption > 3", None),  # text and numbers do not compare
        ("width / 0 > 1", None),
        ("caption * 1000000000 == 'x'", None),
    ],
)
def test_a_condition_is_true_false_or_unknown(text: str, wanted: bool | None) -> None:
    assert Condition(text)(RECORD) is wanted
    assert pickle.loads(pickle.dumps(Condition(text)))(RECORD) is wanted


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /tmp/never')",
        "().__class__.__bases__",
        "similarity.real > 0",
        "[x for x in caption]",
        "lambda: 1",
        "json[width]",
        "caption[0] == 'a'",
        "2 ** 100000000 > 1",
        "f'{similarity}' == '1'",
        "(y := 3) > 2",
        "width is 512",
        "similarity >",
        "",
        "(" * 3000 + "1" + ")" * 3000,
        "1 " * 4000,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.filter"):
        Condition(text)


def test_the_keys_that_it_asks_for_are_known() -> None:
    assert Condition("a > 1 and json['b c'] < 2 and a < 3").keys == {"a", "b c"}


@pytest.mark.parametrize(
    "text", ["similarity > 0.3 and width >= 256 and punsafe < 0.5", "'a' in caption or json[\"b c\"] == 'd'"]
)
def test_a_condition_is_given_on_the_command_line_as_it_is_written(text: str) -> None:
    assert compose_job("index", ["data.shards=x", f"data.filter={text}"])["data"]["filter"] == text
    assert compose_job("index", ["data.shards=x", "data.filter=null"])["data"]["filter"] is None
    assert compose_job("index", ["data.shards=x", 'data.filter="a > 1"'])["data"]["filter"] == "a > 1"
