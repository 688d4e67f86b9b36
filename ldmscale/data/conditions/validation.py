"""Looks at the conditions of a sample when shards are indexed: labels, boxes and maps that no run could use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldmscale.data.conditions.annotations import ClassLabels, GivenEmbeddings, raw_label
from ldmscale.data.conditions.boxes import raw_boxes
from ldmscale.data.conditions.segmentation import read_map
from ldmscale.data.images.decode import ImageHeader, image_header
from ldmscale.errors import DataError


@dataclass(frozen=True)
class Classes:
    """Where labels or boxes are, and which classes there are; None: names are found, so that any will do."""

    source: str  # "cls" or "json:KEY"
    known: ClassLabels | None


@dataclass(frozen=True)
class ConditionChecks:
    """What a training run would read. What is None is not looked at.

    Attributes:
        labels: of the class of a sample.
        boxes: of the classes of its boxes.
        embeddings: reads its embeddings.
        map_member, map_classes: of its map, if `map_classes` is given.
    """

    labels: Classes | None = None
    boxes: Classes | None = None
    embeddings: GivenEmbeddings | None = None
    map_member: str = "map.png"
    map_classes: int | None = None

    @property
    def nothing(self) -> bool:
        """Whether nothing is looked at."""
        return self == ConditionChecks(map_member=self.map_member)

    @property
    def members(self) -> frozenset[str]:
        """Extensions of the members that are looked at."""
        found = {
            classes.source.partition(":")[0] for classes in (self.labels, self.boxes) if classes is not None
        }
        if self.embeddings is not None:
            found.add(self.embeddings.member)
        if self.map_classes is not None:
            found.add(self.map_member)
        return frozenset(found)

    def plain(self) -> dict[str, Any]:
        """As the index records what it looked at."""
        return asdict(self)

    def faults(
        self,
        members: Mapping[str, bytes],
        header: Callable[[], ImageHeader | None],
        check: str,
        max_pixels: int,
    ) -> Iterator[tuple[str, str]]:
        """What is wrong with a sample, as (kind of damage, reason).

        Args:
            members: extension to bytes.
            header: of the sample's image; None where it cannot be read.
            check: "headers" compares the size of a map, "decode" looks at its numbers, too.
        """
        for kind, look in (
            ("bad_label", self._label),
            ("bad_boxes", self._boxes),
            ("bad_embeddings", self._embeddings),
        ):
            try:
                look(members)
            except DataError as error:
                yield kind, str(error)
        if self.map_classes is None:
            return
        try:
            self._map(members, header(), check, max_pixels)
        except DataError as error:
            yield "bad_map", str(error)

    def _label(self, members: Mapping[str, bytes]) -> None:
        if self.labels is not None:
            label = raw_label(members, self.labels.source)
            if self.labels.known is not None:
                self.labels.known.number(label)

    def _boxes(self, members: Mapping[str, bytes]) -> None:
        if self.boxes is not None:
            for box in raw_boxes(members, self.boxes.source):
                if self.boxes.known is not None:
                    self.boxes.known.number(box.label)

    def _embeddings(self, members: Mapping[str, bytes]) -> None:
        if self.embeddings is not None:
            self.embeddings.of(members)

    def _map(
        self, members: Mapping[str, bytes], image: ImageHeader | None, check: str, max_pixels: int
    ) -> None:
        assert self.map_classes is not None
        if check == "decode" or self.map_member not in members:
            read_map(members, self.map_member, self.map_classes, max_pixels)
        found = image_header(members[self.map_member], max_pixels=max_pixels)
        if image is not None and (found.width, found.height) != (image.width, image.height):
            raise DataError(
                f"its map ({self.map_member}) has {found.width}x{found.height} pixels, its image "
                f"{image.width}x{image.height}"
            )
