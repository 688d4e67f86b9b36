"""Tokenizers of pretrained text encoders (CLIP, T5), and what all tokenizers share: rows of ids of one length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ldmscale.errors import DataError
from ldmscale.storage.atomic import new_folder, replace_folder
from ldmscale.storage.digest import sha256
from ldmscale.storage.given_files import read_given_object, read_given_text
from ldmscale.storage.hub import cached_first

REMEDY = "give the folder of a tokenizer, or get it again"


def of_one_length(backend: tokenizers.Tokenizer, max_tokens: int, pad_id: int, pad_token: str) -> None:
    """Has the backend cut captions that are too long, and fill up the others."""
    # The library warns, and turns itself off, when a process forks after it has used its threads; rows are short.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    backend.enable_truncation(max_tokens)
    backend.enable_padding(pad_id=pad_id, pad_token=pad_token, length=max_tokens)


def encode(backend: tokenizers.Tokenizer, captions: Sequence[str], max_tokens: int) -> np.ndarray:
    """Token ids int64 [B, max_tokens]."""
    if not captions:
        return np.empty((0, max_tokens), dtype=np.int64)
    return np.array([row.ids for row in backend.encode_batch(list(captions))], dtype=np.int64)


def decode(backend: tokenizers.Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """The text of one row of ids, special tokens left out."""
    return str(backend.decode([int(value) for value in ids], skip_special_tokens=True))


def tokenizer_of(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json. Raises DataError where it is none."""
    text = read_given_text(file, REMEDY)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{file} is no tokenizer ({error}): {REMEDY}") from error


class EncoderTokenizer:
    """Turns captions into token ids of a fixed length, with the encoder's own special tokens. Make it with `load`.

    Attributes:
        max_tokens: length of every row of ids.
        vocab_size: number of ids.
        pad_id: fills a row up.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_tokens: int, pad_token: str) -> None:
        number = backend.token_to_id(pad_token)
        if number is None:
            raise DataError(f"the tokenizer has no token {pad_token!r}, which it names for padding")
        self.max_tokens = max_tokens
        self.vocab_size = backend.get_vocab_size()
        self.pad_id = int(number)
        self._backend = backend
        of_one_length(backend, max_tokens, self.pad_id, pad_token)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], max_tokens: int) -> EncoderTokenizer:
        """The tokenizer that `keep` put into a folder.

        Raises DataError where the folder is none, or names no token for padding.
        """
        files = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
        if not all(file.is_file() for file in files):
            raise DataError(
                f"{folder} has no tokenizer.json and tokenizer_config.json; give a tokenizer's folder"
            )
        pad = read_given_object(files[1], REMEDY).get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if pad is None:
            raise DataError(f"{files[1]} names no pad_token, and captions need to be filled up to one length")
        if not isinstance(pad, str):
            raise DataError(f"{files[1]}: pad_token is a {type(pad).__name__}, expected a text: {REMEDY}")
        return cls(tokenizer_of(files[0]), max_tokens, pad)

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Returns token ids int64 [B, max_tokens], long captions cut."""
        return encode(self._backend, captions, self.max_tokens)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many ids of each caption's row are no padding."""
        return [sum(row.attention_mask) for row in self._backend.encode_batch(list(captions))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of one row of ids, special tokens left out."""
        return decode(self._backend, ids)

    @property
    def fingerprint(self) -> str:
        """Identifies vocabulary, rules and length."""
        return sha256(self._backend.to_str())[:16]


def keep(name_or_folder: str, folder: str | os.PathLike[str]) -> None:
    """Put the tokenizer of a folder or hub name into `folder`, so that sampling never asks the network for it.

    Raises DataError where there is none.
    """
    target = Path(folder)
    try:
        found = from_hub(name_or_folder)
        found.chat_template = None  # its names become names of files, and captions need none
        with new_folder(target) as temporary:
            found.save_pretrained(temporary)
            if not (temporary / "tokenizer.json").is_file():
                raise DataError(f"{type(found).__name__} cannot be written as tokenizer.json")
            replace_folder(temporary, target)  # an earlier start may have left one
    except Exception as error:  # no network, no such name, no access: the hub's client raises many kinds
        raise DataError(
            f"text_encoder.path={name_or_folder} gives no tokenizer ({type(error).__name__}: {error}): give the folder of "
            "model and tokenizer"
        ) from error


def from_hub(name_or_folder: str) -> Any:
    """The transformers tokenizer of a name or folder. Raises whatever the hub's client raises.

    Raises DataError where the tokenizer is Python code of the folder itself (`auto_map`): such code never runs.
    """
    # transformers takes seconds to import, and a tokenizer that was kept does not need it.
    from transformers import AutoTokenizer

    try:
        return cached_first(
            lambda local: AutoTokenizer.from_pretrained(
                name_or_folder, trust_remote_code=False, local_files_only=local
            )
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        # The library advises its own switch, which would run the code.
        raise DataError(
            f"the tokenizer of {name_or_folder} is Python code in that folder (auto_map of tokenizer_config.json), which "
            "ldmscale never runs; give a tokenizer that the transformers library has itself"
        ) from error
