"""Values are taken as users write them, where Hydra's grammar has no place for them."""

import pytest

from ldmscale.config.compose import compose_job
from ldmscale.config.overrides import plain

PATTERNS = [
    "/data/{00000..00009}.tar",
    "{a,b}/*.tar",
    "/data/[0-9]*.tar",
    "s3://bucket/{000..099}.tar",
    "https://host/a.tar?key=1&more=%20",
    "pipe:curl -s 'http://host/a.tar' | cat; true",
    "it's (here).tar",
    "back\\slash {",
    "back\\'quoted\\\\'",
]


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_is_taken_as_it_is_written_alone_and_in_a_list(text):
    assert compose_job("index", [f"data.shards={text}"])["data"]["shards"] == text
    assert compose_job("index", [f"++data.shards={text}"])["data"]["shards"] == text
    if "," not in text.replace("{a,b}", ""):
        assert compose_job("index", [f"data.shards=[a.tar, {text}]"])["data"]["shards"] == ["a.tar", text]


def test_mixtures_may_leave_their_quotes_away():
    written = 'data.shards=[{shards: /a/{0..3}.tar, weight: 3}, {shards: "s3://b/{00..99}.tar", weight: 1.5}]'
    assert compose_job("index", [written])["data"]["shards"] == [
        {"shards": "/a/{0..3}.tar", "weight": 3},
        {"shards": "s3://b/{00..99}.tar", "weight": 1.5},
    ]


def test_what_hydra_can_read_means_what_hydra_says():
    for override in ("a=3", "a=[1,2]", "a='x{'", "a={b: 1}", "a=null", "a=${b}", "a=1,2", "a=", "a=x y", "a"):
        assert plain(override) == override
    assert plain("a={b") == "a='{b'" and plain(plain("a={b")) == "a='{b'"
