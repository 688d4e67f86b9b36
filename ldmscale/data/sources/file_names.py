"""Captions from file names: the words of the folders, then those of the name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

# Between the words of tileGrass and HTTPServer: before a capital behind a small letter, and before the last
# of several capitals that a small letter follows.
_JOINT = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][^\W\d_A-Z])")
_WORD = re.compile(r"[^\W\d_]+|\d+")


def words_of(text: str) -> list[str]:
    """Splits camelCase, digits and separators; lower case; numbers without leading zeros.

    >>> words_of("tileGrass_roadCornerLL02")
    ['tile', 'grass', 'road', 'corner', 'll', '2']
    """
    found = _WORD.findall(_JOINT.sub(" ", text))
    return [str(int(word)) if word.isdigit() else word.lower() for word in found]


def caption_of_path(path: str) -> str:
    """Makes a caption of a relative path: words of its folders, then those of the name not said yet.

    A word counts as said if a folder has it, alone or as a plural: `cards/cardHearts5.png` becomes
    "cards hearts 5". Numbers and single letters are never left out.
    """
    pure = PurePosixPath(path)
    said: list[str] = []
    for part in pure.parts[:-1]:
        said += _new_words(words_of(part), said)
    return " ".join([*said, *_new_words(words_of(pure.stem), said)])


def class_of_path(path: str) -> str:
    """The class of an image: the words of its first folder, or of one in no folder its name's first word."""
    pure = PurePosixPath(path)
    if len(pure.parts) > 1:
        return " ".join(words_of(pure.parts[0])) or pure.parts[0].lower()
    return next(iter(words_of(pure.stem)), "image")


def unique_captions(captions: Sequence[str]) -> list[str]:
    """Tells equal captions apart by a number behind the second and later ones."""
    taken = set(captions)
    seen: set[str] = set()
    unique = []
    for caption in captions:
        number = 2
        name = caption
        while name in seen or (name != caption and name in taken):
            name = f"{caption} {number}"
            number += 1
        seen.add(name)
        unique.append(name)
    return unique


def _new_words(words: list[str], said: list[str]) -> list[str]:
    stems = {_stem(word) for word in said}
    fresh = [word for word in words if len(word) == 1 or word.isdigit() or _stem(word) not in stems]
    return fresh or words  # a name that only repeats its folder still says something


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
