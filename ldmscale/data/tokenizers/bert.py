"""Captions to token ids: BERT's tokenizer by name or folder, or a WordPiece trained on one's own captions.

Ids are laid out as BertTokenizerFast(padding="max_length", truncation=True) does it: [CLS] words [SEP] and
[PAD] up to the model's length. A tokenizer is saved with the run, so that sampling never asks the network for
one.

The vocabulary is learned here and not by the trainer of `tokenizers`, which leaves the choice among equally frequent
pairs to its hash tables: eight runs on one small set of captions gave eight vocabularies. Here ties go to the pair that
comes first in the alphabet, so that a repeated run is the same run.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ldmscale.data.tokenizers.pretrained import REMEDY, decode, encode, from_hub, of_one_length, tokenizer_of
from ldmscale.errors import DataError
from ldmscale.storage.atomic import write_file
from ldmscale.storage.digest import sha256
from ldmscale.storage.given_files import lines_of, read_given_object, read_given_text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


Pair = tuple[str, str]


def train_wordpiece(captions: Iterable[str], vocab_size: int, folder: str | os.PathLike[str]) -> None:
    """Trains a lower-casing WordPiece vocabulary and saves it as a folder that BertTokenizerFast loads, too.

    Args:
        captions: the training captions.
        vocab_size: largest number of ids, the five special ones included; small sets of captions end with
            fewer.
        folder: gets tokenizer.json, vocab.txt and tokenizer_config.json.

    Raises:
        DataError: if there is no caption, or the vocabulary cannot even hold the special tokens.
    """
    texts = [caption for caption in captions if caption.strip()]
    if not texts or vocab_size <= len(SPECIAL):
        raise DataError(
            f"cannot train a vocabulary of {vocab_size} ids on {len(texts)} captions; give captions, and "
            f"more than {len(SPECIAL)} ids"
        )
    backend = tokenizers.Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    _dress(backend, lowercase=True)
    words: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    pieces = learn_pieces(words, vocab_size - len(SPECIAL))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *pieces])}
    _of_vocabulary(vocabulary, lowercase=True, max_tokens=512).save(folder)


class Tokenizer:
    """Turns captions into token ids of a fixed length. Make it with `load`.

    Attributes:
        max_tokens: length of every row of ids.
        vocab_size: number of ids.
        pad_id, cls_id, sep_id, unk_id: ids of the special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_tokens: int, lowercase: bool) -> None:
        self.max_tokens = max_tokens
        self.lowercase = lowercase
        self.vocab_size = backend.get_vocab_size()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (
            _special_id(backend, token) for token in SPECIAL[:4]
        )
        self._backend = backend
        of_one_length(backend, max_tokens, self.pad_id, "[PAD]")

    @classmethod
    def load(cls, name_or_folder: str | os.PathLike[str], max_tokens: int) -> Tokenizer:
        """Loads a BERT-like tokenizer.

        Args:
            name_or_folder: a folder with tokenizer.json or vocab.txt, or a name on the model hub
                (`bert-base-uncased`).
            max_tokens: length of every row of ids, [CLS] and [SEP] included.

        Raises:
            DataError: if there is none, or it lacks BERT's special tokens.
        """
        folder = Path(name_or_folder)
        lowercase = True
        config = folder / "tokenizer_config.json"
        if config.is_file():
            lowercase = bool(read_given_object(config, REMEDY).get("do_lower_case", True))
        if (folder / "tokenizer.json").is_file():
            return cls(tokenizer_of(folder / "tokenizer.json"), max_tokens, lowercase)
        if (folder / "vocab.txt").is_file():
            lines = lines_of(read_given_text(folder / "vocab.txt", REMEDY))
            return _of_vocabulary(
                {token: number for number, token in enumerate(lines)},
                lowercase=lowercase,
                max_tokens=max_tokens,
            )
        if folder.is_dir():
            raise DataError(f"{folder} has neither tokenizer.json nor vocab.txt; give a tokenizer's folder")
        return cls(_from_hub(str(name_or_folder)), max_tokens, lowercase=True)

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Returns token ids int64 [B, max_tokens]: [CLS] words [SEP] [PAD] ..., long captions cut."""
        return encode(self._backend, captions, self.max_tokens)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of one row of ids, special tokens left out."""
        return decode(self._backend, ids)

    @property
    def fingerprint(self) -> str:
        """Identifies vocabulary and length: models trained with another one do not understand these ids."""
        vocabulary = sorted(self._backend.get_vocab().items(), key=lambda entry: entry[1])
        return sha256(json.dumps([vocabulary, self.max_tokens, self.lowercase]))[:16]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves tokenizer.json, vocab.txt and tokenizer_config.json, as BertTokenizerFast loads them."""
        target = Path(folder)
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.no_padding()
        plain.no_truncation()
        write_file(target / "tokenizer.json", plain.to_str(pretty=True).encode("utf-8"))
        by_id = sorted(self._backend.get_vocab().items(), key=lambda entry: entry[1])
        write_file(target / "vocab.txt", "".join(f"{token}\n" for token, _ in by_id).encode("utf-8"))
        config = {
            "tokenizer_class": "BertTokenizerFast",
            "do_lower_case": self.lowercase,
            "model_max_length": self.max_tokens,
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        }
        write_file(target / "tokenizer_config.json", json.dumps(config, indent=2).encode("utf-8"))


def _of_vocabulary(vocabulary: dict[str, int], *, lowercase: bool, max_tokens: int) -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    _dress(backend, lowercase=lowercase)
    cls_id, sep_id = (_special_id(backend, token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, max_tokens, lowercase)


def _dress(backend: tokenizers.Tokenizer, *, lowercase: bool) -> None:
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()


def _special_id(backend: tokenizers.Tokenizer, token: str) -> int:
    number = backend.token_to_id(token)
    if number is None:
        raise DataError(
            f"the tokenizer has no {token}; it must be BERT-like (special tokens {', '.join(SPECIAL)})"
        )
    return int(number)


def _from_hub(name: str) -> tokenizers.Tokenizer:
    try:
        backend: tokenizers.Tokenizer = from_hub(name).backend_tokenizer
        return backend
    except DataError:
        raise
    except Exception as error:  # no network, no such name, no access: the hub's client raises many kinds
        raise DataError(
            f"tokenizer {name!r} is no local folder and cannot be had from the model hub "
            f"({type(error).__name__}); on a machine "
            'with network run `python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{name}').save_pretrained('FOLDER')\"` and give text_encoder.tokenizer=FOLDER"
        ) from error


def learn_pieces(words: Mapping[str, int], size: int) -> list[str]:
    """Returns up to `size` pieces: all letters first, then the pieces that merging the most frequent pairs
    makes.

    Pieces inside a word begin with "##". Where not even the letters fit, the most frequent ones stay.

    Args:
        words: how often each word occurs.
        size: number of pieces wanted.
    """
    split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in words if word}
    letters: dict[str, int] = defaultdict(int)
    counts: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[str]] = defaultdict(set)
    for word, parts in split.items():
        for part in parts:
            letters[part] += words[word]
        for pair in itertools.pairwise(parts):
            counts[pair] += words[word]
            where[pair].add(word)
    pieces = sorted(letters, key=lambda part: (-letters[part], part))[:size]
    known = set(pieces)
    # Counts change as pairs merge; an entry that no longer tells the truth is dropped when it comes up.
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    while queue and len(pieces) < size:
        count, pair = heapq.heappop(queue)
        if -count != counts[pair] or count == 0:
            continue
        merged = pair[0] + pair[1].removeprefix("##")
        if merged not in known:
            known.add(merged)
            pieces.append(merged)
        changed: set[Pair] = set()
        for word in sorted(where.pop(pair)):
            before = split[word]
            after = split[word] = _merged(before, pair, merged)
            for old in itertools.pairwise(before):
                counts[old] -= words[word]
                changed.add(old)
            for new in itertools.pairwise(after):
                counts[new] += words[word]
                where[new].add(word)
                changed.add(new)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(queue, (-counts[other], other))
    return pieces


def _merged(parts: list[str], pair: Pair, merged: str) -> list[str]:
    after: list[str] = []
    at = 0
    while at < len(parts):
        if tuple(parts[at : at + 2]) == pair:
            after.append(merged)
            at += 2
        else:
            after.append(parts[at])
            at += 1
    return after
