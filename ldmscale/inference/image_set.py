"""A set of drawn images on disk: which are wanted, which are there, and that all were drawn alike.

A folder has one PNG an image, grid.png, and sample.json: what the images depend on, and their prompts. A picture is written
whole or not at all, so a set of any size goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, Field

from ldmscale.errors import ConfigError
from ldmscale.storage.atomic import finished_file, write_file
from ldmscale.storage.digest import file_sha256, listing_sha256, sha256
from ldmscale.storage.plain_values import checked, parsed_object
from ldmscale.tracking.images import tile, write_png

GRID_IMAGES = 64  # at most; a grid of thousands is no help
GRID_CELL = 256  # pixels of its images' longer side, at most
_LAST_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG


@dataclass(frozen=True)
class Wanted:
    """One image; its file is named after its number."""

    number: int
    prompt: str
    negative: str
    seed: int

    @property
    def file_name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:48]
        return f"{self.number:06d}_{words or 'prompt'}_{self.seed}.png"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a set with their negative prompts, one each ("" is the null condition)."""

    texts: list[str]
    negatives: list[str]

    def images(self, per_prompt: int, first_seed: int, distinct_seeds: bool) -> list[Wanted]:
        """Every image of the set, in its order."""
        return [
            Wanted(
                at * per_prompt + i,
                text,
                negative,
                first_seed + (at * per_prompt if distinct_seeds else 0) + i,
            )
            for at, (text, negative) in enumerate(zip(self.texts, self.negatives, strict=True))
            for i in range(per_prompt)
        ]


class _Record(BaseModel):
    """sample.json."""

    made_by: dict[str, str]
    prompts: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class SampleFolder:
    """The folder of one set. `made_by` is everything, besides prompt and seed, that its images depend on."""

    def __init__(self, path: Path, made_by: Mapping[str, str]) -> None:
        self.path, self.made_by = path, dict(made_by)
        self.record = path / "sample.json"

    def settle(self, prompts: Prompts) -> None:
        """Claim the folder for this set, or go on with it; rank 0 only.

        A set may grow by prompts at its end. Raises ConfigError naming each parameter and prompt that differs from what
        the folder was begun with, and where pictures are there of which nothing is known.
        """
        given = [list(pair) for pair in zip(prompts.texts, prompts.negatives, strict=True)]
        known: list[list[str]] = []
        if self.record.exists():
            try:
                told = checked(_Record, parsed_object(self.record.read_bytes()))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{self.record} is damaged ({error}): restore it from a copy, or give another folder as sample.out"
                ) from error
            known = told.prompts
            if faults := [*self._changed(told.made_by), *self._other_prompts(known, given)]:
                raise ConfigError(faults)
        elif self.path.is_dir() and next(self.path.glob("*.png"), None) is not None:
            raise ConfigError(
                f"sample.out={self.path} has pictures but no sample.json that tells how they were drawn: give another folder"
            )
        if len(given) > len(known) or not self.record.exists():
            text = json.dumps({"made_by": self.made_by, "prompts": given}, indent=1, ensure_ascii=False)
            write_file(self.record, text.encode("utf-8"))

    def abandon(self) -> None:
        """Leave a folder in which nothing could be drawn for another try, with other prompts or parameters."""
        if next(self.path.glob("*.png"), None) is None:
            self.record.unlink(missing_ok=True)

    def missing(self, images: Iterable[Wanted]) -> list[int]:
        """Numbers of the images that are not there whole."""
        there = {entry.name for entry in os.scandir(self.path) if entry.name.endswith(".png")}
        return [
            image.number
            for image in images
            if image.file_name not in there or not is_whole(self.path / image.file_name)
        ]

    def write(self, image: Wanted, pixels: np.ndarray) -> None:
        """Write uint8 [H,W,3] as the image's PNG, with all that it depends on in its text chunks."""
        about = PngInfo()
        own = {"prompt": image.prompt, "negative_prompt": image.negative, "seed": str(image.seed)}
        for key, value in (own | self.made_by).items():
            about.add_itxt(key, value)
        with finished_file(self.path / image.file_name) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG", pnginfo=about)

    def write_grid(self, images: Sequence[Wanted], columns: int | None) -> None:
        """grid.png of the first images, made smaller where they are large."""
        shown = images[:GRID_IMAGES]
        cells = _of_one_size(list(self._cells(shown)))
        write_png(self.path / "grid.png", tile(cells, columns), [image.prompt for image in shown])

    def _cells(self, images: Sequence[Wanted]) -> Iterator[np.ndarray]:
        for image in images:
            with Image.open(self.path / image.file_name) as drawn:
                cell = drawn.convert("RGB")
                cell.thumbnail((GRID_CELL, GRID_CELL))
                yield np.asarray(cell)

    def _changed(self, before: Mapping[str, str]) -> list[str]:
        faults = []
        for key in sorted({*before, *self.made_by} - {"model", "ldmscale"}):
            old, new = before.get(key, ""), self.made_by.get(key, "")
            if old == new:
                continue
            if key == "checkpoint":
                faults.append(
                    f"the model's newest checkpoint is {new}, but {self.path} was drawn by {old}: give another sample.out"
                )
            elif key == "condition" and old and new:
                faults.append(
                    f"sample.condition: its files are not those that {self.path} was drawn from: give those of then to go on "
                    "with that set, or another sample.out"
                )
            else:
                # A picture is told with a digest behind its name.
                value = (
                    "the file of then"
                    if key in ("image", "mask") and old
                    else f"sample.{key}={old or 'null'}"
                )
                faults.append(
                    f"sample.{key}={new or 'null'}, but {self.path} was drawn with {old or 'null'}: give {value} to go on with "
                    "that set, or another sample.out"
                )
        return faults

    def _other_prompts(self, before: list[list[str]], given: list[list[str]]) -> list[str]:
        different = [n for n, (old, new) in enumerate(zip(before, given, strict=False)) if old != new]
        if not different:
            return []
        n = different[0]
        name = "prompts" if before[n][0] != given[n][0] else "negative_prompts"
        old, new = (pair[name == "negative_prompts"] for pair in (before[n], given[n]))
        return [
            f"sample.{name}: number {n + 1} is {new!r}, but {self.path} was begun with {old!r} ({len(different)} differ): "
            "give the prompts of then, with new ones behind them, or another sample.out"
        ]


def _of_one_size(cells: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [H,W,3] of several sizes -> [N,H,W,3], white where a cell is smaller than the largest."""
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    whole = np.full((len(cells), height, width, 3), 255, np.uint8)
    for at, cell in enumerate(cells):
        whole[at, : cell.shape[0], : cell.shape[1]] = cell
    return whole


def is_whole(path: Path) -> bool:
    """Whether a PNG has its last chunk: a node that died may leave a file without its end."""
    with open(path, "rb") as stream:
        if stream.seek(0, os.SEEK_END) < len(_LAST_CHUNK):
            return False
        stream.seek(-len(_LAST_CHUNK), os.SEEK_END)
        return stream.read() == _LAST_CHUNK


def free_folder(samples: Path, made_by: Mapping[str, str], prompts: Prompts) -> SampleFolder:
    """The first of drawn, drawn_2 ... in `samples` that this set can begin or go on in; rank 0 only."""
    number = 1
    while True:
        folder = SampleFolder(samples / ("drawn" if number == 1 else f"drawn_{number}"), made_by)
        try:
            folder.settle(prompts)
        except ConfigError:
            number += 1
        else:
            return folder


def file_digest(path: str | Path) -> str:
    """What tells a file from another one of the same name: 12 characters of its SHA-256."""
    return file_sha256(path)[:12]


def text_digest(text: str) -> str:
    """The same for a text."""
    return sha256(text)[:12]


def listing_digest(path: Path) -> str:
    """The same for a model of many large files, by their names, sizes and times of change; drawn pictures do not count."""
    return listing_sha256(path, without="samples")[:12]
