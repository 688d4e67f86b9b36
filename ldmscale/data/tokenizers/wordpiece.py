"""Learns a WordPiece vocabulary from counted words, the same one every time.

The trainer of `tokenizers` leaves the choice among equally frequent pairs to its hash tables: eight runs on
one small set of captions gave eight vocabularies. Here ties go to the pair that comes first in the alphabet,
so that a run made again is the same run.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Mapping

Pair = tuple[str, str]


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
