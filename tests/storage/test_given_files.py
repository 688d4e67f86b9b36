"""Files of users: the lines that they have, and one message for each cause that none can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.errors import ConfigError, DataError
from ldmscale.storage.given_files import lines_of, read_given_object, read_given_text

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1034\n"


def test_lines_end_at_line_feeds_alone() -> None:
    """huggingface/transformers#860: U+2028, U+0085 and form feeds are part of a line."""
    text = "one\u2028still one\ntwo\x85\x0c\x1c\r\n\nfour"
    assert lines_of(text) == ["one\u2028still one", "two\x85\x0c\x1c", "", "four"]
    assert lines_of("") == [] and lines_of("a\n") == ["a"] and lines_of("\n") == [""]


def test_ids_of_a_vocabulary_do_not_shift(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "cat", "\x85x", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    ids = Tokenizer.load(tmp_path, 5).encode(["cat dog"])[0].tolist()
    assert ids == [2, words.index("cat"), words.index("dog"), 3, 0]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (POINTER, "is a Git LFS pointer.*git lfs pull"),
        (b"caf\xe9", "is not UTF-8 .byte 3 is 0xe9.*give another"),
        (b"", "holds no JSON object .*give another"),
        (b'{"a": [1', "holds no JSON object .*give another"),
        (b"[1, 2]", "holds no JSON object .*give another"),
        (b"[" * 100_000, "holds no JSON object .*nested deeper.*give another"),
        (None, "cannot be read .it is a folder.*give another"),
        ("loop", "cannot be read .Too many levels of symbolic links.*give another"),
        ("gone", "cannot be read .No such file or directory.*give another"),
    ],
)
def test_each_cause_has_its_message(tmp_path: Path, content: bytes | str | None, fault: str) -> None:
    path = tmp_path / "given.json"
    if content is None:
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_given_object(path, "give another", ConfigError)
    (message,) = caught.value.faults
    assert re.search(fault, message) and str(path) in message


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    assert read_given_text(tmp_path / "a.txt", "give another") == "caf\u00e9\n"


def test_no_text_of_a_file_is_cut_where_python_sees_lines() -> None:
    """What is read from files goes through `lines_of`; the rest is output of programs and errors."""
    allowed = {
        "builders/attention.py", "builders/feature_networks.py", "builders/networks.py", "checkpoint/run_folder.py",
        "cluster/doctor_run.py", "cluster/slurm.py", "data/shards/urls.py", "data/sources/wheel.py",
        "distributed/pinning.py", "interop/pickles.py", "tracking/metrics.py", "train/dry_run.py",
    }  # fmt: skip
    package = Path(__file__).parents[2] / "ldmscale"
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if ".splitlines(" in p.read_text()}
    assert found <= allowed


def test_data_error_is_the_usual_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_given_text(tmp_path / "none", "give another")
