"""Layouts: boxes with classes, read from the json of a sample and told to the model as tokens.

As published with layout2img-openimages256: three tokens an object, its class and the positions of the top left and the
bottom right corner, a position being a number of a square grid over the whole image, row by row; "no object" fills up;
the last two tokens are the corners of the part of the image that is seen. 92 tokens hold 30 objects, a vocabulary of 8192
a grid of 90 x 90.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.record import parse_record
from ldmscale.data.images.decode import View
from ldmscale.errors import DataError

OBJECT_TOKENS, CROP_TOKENS = 3, 2


class Box(NamedTuple):
    """An object: its class, and its corners as shares of the whole image's width and height, 0 to 1."""

    label: int
    left: float
    top: float
    right: float
    bottom: float


class RawBox(NamedTuple):
    """An object as the json tells it, its corners checked and its class not yet."""

    label: int | str
    corners: tuple[float, float, float, float]


WHOLE = Box(0, 0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class LayoutTokens:
    """Reads boxes and makes tokens of them. A value, so that loading processes can have it.

    Attributes:
        labels: the classes; its source is where the boxes are, "json:KEY".
        max_tokens: of a layout: 3 an object, and 2.
        vocab_size: of the text transformer. Its last id is "no object", the largest square below it the grid.
    """

    labels: ClassLabels
    max_tokens: int
    vocab_size: int

    @property
    def objects(self) -> int:
        """How many objects a layout can have."""
        return (self.max_tokens - CROP_TOKENS) // OBJECT_TOKENS

    @property
    def grid(self) -> int:
        """Positions along one side of the image."""
        return math.isqrt(self.vocab_size - 1)

    @property
    def nothing(self) -> int:
        """The id that says "no object"."""
        return self.vocab_size - 1

    def of(self, members: Mapping[str, bytes], size: tuple[int, int], view: View) -> np.ndarray:
        """The tokens of a sample in the view that its image is seen in, int64 [max_tokens].

        Objects outside of the view are left out, and those that are more than `objects` (the json's order counts).

        Args:
            size: (width, height) of the whole image in pixels, as `view` has it.

        Raises:
            DataError: if it has no boxes, a box is outside of the image, or a class is none.
        """
        seen = seen_part(size, view)
        boxes = [box for box in self.boxes(members) if _overlap(box, seen)]
        if view.mirrored:
            boxes, seen = [_mirrored(box) for box in boxes], _mirrored(seen)
        return self.encode(boxes, seen)

    def boxes(self, members: Mapping[str, bytes]) -> list[Box]:
        """The boxes of a sample as its json has them. Raises DataError as `of`."""
        return [
            Box(self.labels.number(raw.label), *raw.corners) for raw in raw_boxes(members, self.labels.source)
        ]

    def encode(self, boxes: Sequence[Box], seen: Box = WHOLE) -> np.ndarray:
        """Tokens int64 [max_tokens] of boxes, in their order; `seen` is the part of the image that is drawn."""
        tokens = [token for box in boxes[: self.objects] for token in (box.label, *self._corners(box))]
        tokens += [self.nothing] * (OBJECT_TOKENS * self.objects - len(tokens))
        return np.array([*tokens, *self._corners(seen)], dtype=np.int64)

    def title(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The classes of a layout's objects, for a picture's caption."""
        found = [int(token) for token in tokens[: OBJECT_TOKENS * self.objects : OBJECT_TOKENS]]
        return ", ".join(self.labels.title(label) for label in found if label != self.nothing) or "nothing"

    def _corners(self, box: Box) -> tuple[int, int]:
        return self._position(box.left, box.top), self._position(box.right, box.bottom)

    def _position(self, x: float, y: float) -> int:
        last = self.grid - 1
        return round(y * last) * self.grid + round(x * last)


def raw_boxes(members: Mapping[str, bytes], source: str) -> list[RawBox]:
    """The objects of a sample: [{"class": a number or name, "box": [left, top, right, bottom]}, ...], corners 0 to 1.

    Args:
        members: extension to bytes, as `samples.Sample.members`.
        source: "json:KEY".

    Raises:
        DataError: if there is no such list, or a box is outside of the image or empty. An empty list is a layout, too.
    """
    member, _, key = source.partition(":")
    if member not in members:
        raise DataError(
            f"has no {member} member for the boxes (members: {', '.join(sorted(members)) or 'none'})"
        )
    try:
        listed = parse_record(members[member])[key]
    except DataError as error:
        raise DataError(f"its boxes ({source}) cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"its boxes ({source}) cannot be read: {type(error).__name__} {error}") from error
    if not isinstance(listed, list):
        raise DataError(f"its boxes ({source}) are a {type(listed).__name__}; expected a list of objects")
    return [_raw_box(entry, source) for entry in listed]


def seen_part(size: tuple[int, int], view: View) -> Box:
    """A view as shares of the whole image, before it is mirrored."""
    width, height = size
    return Box(
        0,
        view.left / width,
        view.top / height,
        (view.left + view.width) / width,
        (view.top + view.height) / height,
    )


def size_told(members: Mapping[str, bytes]) -> tuple[int, int]:
    """(width, height) of an image that is not there, as its json tells them.

    Raises:
        DataError: if it does not.
    """
    try:
        record = parse_record(members["json"])
        width, height = int(record["width"]), int(record["height"])
    except (DataError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise DataError(
            f"its json does not tell the image's width and height, which place the boxes: {type(error).__name__} {error}"
        ) from error
    if width < 1 or height < 1:
        raise DataError(f"its json tells an image of {width}x{height} pixels")
    return width, height


def _raw_box(entry: Any, source: str) -> RawBox:
    try:
        label, corners = entry["class"], tuple(float(corner) for corner in entry["box"])
        left, top, right, bottom = corners
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"its boxes ({source}) have {str(entry)[:80]}; expected class and box: [left, top, right, bottom]"
        ) from error
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(f"its boxes ({source}) have the class {label!r}; expected a whole number or a name")
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise DataError(
            f"its box of {label!r} [{left:g}, {top:g}, {right:g}, {bottom:g}] is outside of the image, or empty: expected "
            "left < right and top < bottom in 0 to 1, shares of its width and height"
        )
    return RawBox(label, (left, top, right, bottom))


def _overlap(box: Box, seen: Box) -> bool:
    return box.left < seen.right and seen.left < box.right and box.top < seen.bottom and seen.top < box.bottom


def _mirrored(box: Box) -> Box:
    return box._replace(left=1 - box.right, right=1 - box.left)
