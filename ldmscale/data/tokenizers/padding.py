"""What all our tokenizers share: captions to rows of ids of one length, and how one is had from the model hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from ldmscale.errors import DataError
from ldmscale.storage.hub import cached_first


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
