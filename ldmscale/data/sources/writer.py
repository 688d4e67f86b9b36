"""Captioned images to shards, laid out as img2dataset does it: KEY.png|jpg, KEY.txt, KEY.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmscale.errors import DataError
from ldmscale.storage.atomic import finished_file


@dataclass(frozen=True)
class Item:
    """One captioned image on its way into a shard.

    `metadata` has the img2dataset keys width and height, and "class" and "source" (the path it came from). `more` are
    further members, by extension.
    """

    key: str
    image: bytes
    extension: str
    caption: str
    metadata: dict[str, Any]
    more: dict[str, bytes] = field(default_factory=dict)


def write_shards(
    items: Iterable[Item], folder: str | Path, prefix: str, samples_per_shard: int
) -> list[Path]:
    """Writes items to PREFIX-00000.tar ... in `folder` and returns the paths. Every shard appears whole.

    Raises:
        DataError: if two items have one key.
        ValueError: if samples_per_shard is not at least 1.
    """
    import webdataset  # imports torch

    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    everything = list(items)
    twice = [key for key, count in Counter(item.key for item in everything).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} keys come twice (first: {twice[0]}); keys name samples in ledger and report"
        )
    paths = []
    for number in range(math.ceil(len(everything) / samples_per_shard)):
        path = Path(folder).absolute() / f"{prefix}-{number:05d}.tar"
        part = everything[number * samples_per_shard : (number + 1) * samples_per_shard]
        with (
            finished_file(path) as temporary,
            open(temporary, "wb") as stream,
            webdataset.TarWriter(stream, mtime=0, encoder=False) as tar,
        ):
            for item in part:
                metadata = {"key": item.key, "caption": item.caption, **item.metadata}
                text = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode("utf-8")
                caption = item.caption.encode("utf-8")
                members = {item.extension: item.image, **item.more, "txt": caption, "json": text}
                tar.write({"__key__": item.key, **members})
        paths.append(path)
    return paths
