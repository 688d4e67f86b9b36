"""Our ids are BertTokenizerFast's, from a vocabulary trained here or a folder of BERT's."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmscale.data.tokenizers.bert import SPECIAL, Tokenizer, learn_pieces, train_wordpiece
from ldmscale.errors import DataError

CAPTIONS = ["cards hearts 5", "cards spades k", "tiles grass corner left", "Alien Blue walking, café"] * 3
PROMPTS = ["cards hearts k", "", "unseen zebra", "CAFÉ!", "tiles " * 40]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_wordpiece(CAPTIONS, 200, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_rows_are_cls_words_sep_and_padding(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder, 8)
    ids = tokenizer.encode(PROMPTS)
    assert ids.shape == (5, 8) and ids.dtype == np.int64 and ids.max() < tokenizer.vocab_size
    assert (
        ids[0].tolist()[0] == tokenizer.cls_id
        and ids[0].tolist()[4:] == [tokenizer.sep_id] + [tokenizer.pad_id] * 3
    )
    assert ids[1].tolist() == [tokenizer.cls_id, tokenizer.sep_id] + [tokenizer.pad_id] * 6
    assert ids[4, -1] == tokenizer.sep_id  # cut, and still closed
    assert tokenizer.decode(ids[0]) == "cards hearts k" and tokenizer.encode([]).shape == (0, 8)


@pytest.mark.parametrize("kind", ["BertTokenizerFast", "AutoTokenizer"])
def test_ids_are_those_of_transformers(folder: Path, kind: str) -> None:
    import transformers

    theirs = getattr(transformers, kind).from_pretrained(str(folder))
    wanted = theirs(PROMPTS, padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert Tokenizer.load(folder, 12).encode(PROMPTS).tolist() == wanted


def test_a_folder_with_only_a_vocabulary_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    plain, whole = Tokenizer.load(tmp_path / "plain", 12), Tokenizer.load(folder, 12)
    assert plain.encode(PROMPTS).tolist() == whole.encode(PROMPTS).tolist()
    assert plain.fingerprint == whole.fingerprint != Tokenizer.load(folder, 11).fingerprint


def test_training_is_deterministic_and_bounded(folder: Path, tmp_path: Path) -> None:
    train_wordpiece(CAPTIONS, 200, tmp_path / "again")
    names = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
    assert [(folder / name).read_bytes() for name in names] == [
        (tmp_path / "again" / name).read_bytes() for name in names
    ]
    train_wordpiece(CAPTIONS, 40, tmp_path / "small")
    lines = (tmp_path / "small" / "vocab.txt").read_text().splitlines()
    assert tuple(lines[:5]) == SPECIAL and len(lines) <= 40


def test_saved_and_pickled_tokenizers_are_the_same(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder, 10)
    tokenizer.save(tmp_path / "run")
    for other in (Tokenizer.load(tmp_path / "run", 10), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode(PROMPTS).tolist() == tokenizer.encode(PROMPTS).tolist()


def test_case_is_kept_where_the_folder_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cased").mkdir()
    (tmp_path / "cased" / "vocab.txt").write_text("\n".join([*SPECIAL, "Alien", "alien"]))
    (tmp_path / "cased" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.load(tmp_path / "cased", 4).encode(["Alien alien"]).tolist() == [[2, 5, 6, 3]]


def test_what_is_no_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.load(tmp_path, 8)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"no \[CLS\]"):
        Tokenizer.load(tmp_path, 8)
    with pytest.raises(DataError, match="0 captions"):
        train_wordpiece([" "], 100, tmp_path / "t")


def test_a_name_that_the_hub_does_not_give_is_refused_with_the_remedy() -> None:
    code = (
        "from ldmscale.data.tokenizers.bert import Tokenizer; Tokenizer.load('nobody/no-such-tokenizer', 8)"
    )
    # In a process of its own: the hub's client reads the variable when it is imported.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "DataError" in done.stderr and "save_pretrained" in done.stderr
    assert "text_encoder.tokenizer=FOLDER" in done.stderr


def test_the_most_frequent_pairs_merge_first_and_ties_go_by_the_alphabet() -> None:
    words = {"hugs": 3, "hug": 5, "bun": 5}
    assert learn_pieces(words, 100) == [
        "##u", "##g", "h", "##n", "b", "##s",
        "##ug", "hug", "##un", "bun", "hugs",
    ]  # fmt: skip
    assert learn_pieces(words, 3) == ["##u", "##g", "h"]


@settings(max_examples=40, deadline=None)
@given(words=st.dictionaries(st.text(alphabet="abc", min_size=1, max_size=9), st.integers(1, 5), max_size=12))
def test_with_room_enough_every_word_becomes_one_piece(words: dict[str, int]) -> None:
    pieces = learn_pieces(words, 10_000)
    assert set(words) <= set(pieces) and len(pieces) == len(set(pieces))
    assert learn_pieces(dict(reversed(words.items())), 10_000) == pieces
