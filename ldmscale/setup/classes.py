"""The run's classes, of images or of boxes: numbers, or names found in the shards or listed in a file; stored with the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ldmscale.config import ClassEmbedderConfig, DataConfig, LayoutConfig, TextEncoderConfig
from ldmscale.data.conditions.annotations import ClassLabels, raw_label
from ldmscale.data.conditions.boxes import LayoutTokens, raw_boxes
from ldmscale.data.shards.reader import SampleReader
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.errors import ConfigError, DataError
from ldmscale.setup.run import Run
from ldmscale.storage.given_files import lines_of, read_given_text

log = logging.getLogger(__name__)

FOUND = "found"


def settle_classes(run: Run, data: DataConfig, classes: ClassEmbedderConfig) -> ClassLabels:
    """The classes in the run folder, which rank 0 puts there when the run starts. Collective.

    Raises ConfigError where there are more names than classes.
    """

    def labels(members: Mapping[str, bytes]) -> Iterable[int | str]:
        return [raw_label(members, data.label)]

    return _settled(run, data.label, "class_embedder", classes, labels)


def settle_layout(run: Run, data: DataConfig, layout: LayoutConfig, text: TextEncoderConfig) -> LayoutTokens:
    """What makes tokens of boxes; its classes are in the run folder, as `settle_classes` leaves them. Collective."""

    def labels(members: Mapping[str, bytes]) -> Iterable[int | str]:
        return [box.label for box in raw_boxes(members, data.boxes)]

    settled = _settled(run, data.boxes, "layout", layout, labels)
    return LayoutTokens(settled, text.max_tokens, text.vocab_size)


def _settled(
    run: Run,
    source: str,
    section: str,
    config: ClassEmbedderConfig | LayoutConfig,
    labels: Callable[[Mapping[str, bytes]], Iterable[int | str]],
) -> ClassLabels:
    def settle() -> None:
        if not run.folder.classes.exists():
            class_labels(source, section, config, lambda: _found(run, labels)).save(run.folder.classes)

    from_main_rank(settle)
    return ClassLabels.load(run.folder.classes)


def class_labels(
    source: str, section: str, config: ClassEmbedderConfig | LayoutConfig, found: Callable[[], Iterable[str]]
) -> ClassLabels:
    """The classes that a section of the configuration names; `found` looks for names where it says so.

    Raises ConfigError where there are more names than classes, or no file of them.
    """
    if config.names is None:
        return ClassLabels(source, config.classes)
    if config.names == FOUND:
        names = tuple(found())
    else:
        path = Path(config.names)
        if not path.is_file():
            raise ConfigError(
                f"{section}.names={config.names}: there is no such file; give one, found, or null"
            )
        lines = lines_of(read_given_text(path, "give text in UTF-8, a name a line", ConfigError))
        names = tuple(line.strip() for line in lines if line.strip())
    if len(names) > config.classes or not names:
        raise ConfigError(
            f"{section}.classes={config.classes}, but {section}.names={config.names} gives {len(names)} names: "
            f"give {section}.classes={max(1, len(names))}"
        )
    return ClassLabels(source, config.classes, names)


def _found(run: Run, labels: Callable[[Mapping[str, bytes]], Iterable[int | str]]) -> list[str]:
    """Every label of the shards, read once when the run starts."""
    reader, found = SampleReader(run.index), set[str]()
    for shard, count in enumerate(run.index.counts.tolist()):
        for number in range(count):
            try:
                found.update(str(label) for label in labels(reader.read(shard, number).members))
            except DataError as error:
                log.debug("a sample without a label adds no class: %s", error)
    reader.close()
    return sorted(found)
