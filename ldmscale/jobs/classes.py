"""The run's classes: numbers, or names found in the shards or listed in a file; stored with the run."""

from __future__ import annotations

import logging
from pathlib import Path

from ldmscale.config import ClassEmbedderConfig, DiffusionJob
from ldmscale.data.labels import ClassLabels, raw_label
from ldmscale.data.samples import SampleReader
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.errors import ConfigError, DataError
from ldmscale.jobs.open_run import Run

log = logging.getLogger(__name__)


def settle_classes(run: Run, config: DiffusionJob, classes: ClassEmbedderConfig) -> ClassLabels:
    """The classes in the run folder, which rank 0 puts there when the run starts. Collective.

    Raises ConfigError where there are more names than classes.
    """

    def settle() -> None:
        if not run.folder.classes.exists():
            names = _names(run, config.data.label, classes)
            ClassLabels(config.data.label, classes.classes, names).save(run.folder.classes)

    from_main_rank(settle)
    return ClassLabels.load(run.folder.classes)


def _names(run: Run, source: str, classes: ClassEmbedderConfig) -> tuple[str, ...] | None:
    if classes.names is None:
        return None
    if classes.names == "found":
        names = _found(run, source)
    else:
        path = Path(classes.names)
        if not path.is_file():
            raise ConfigError(
                f"class_embedder.names={classes.names}: there is no such file; give one, found, or null"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    if len(names) > classes.classes or not names:
        raise ConfigError(
            f"class_embedder.classes={classes.classes}, but class_embedder.names={classes.names} gives {len(names)} names: "
            f"give class_embedder.classes={max(1, len(names))}"
        )
    return names


def _found(run: Run, source: str) -> tuple[str, ...]:
    """Every label of the shards, read once when the run starts."""
    reader, found = SampleReader(run.index), set()
    for shard, count in enumerate(run.index.counts.tolist()):
        for number in range(count):
            try:
                found.add(str(raw_label(reader.read(shard, number).members, source)))
            except DataError as error:
                log.debug("a sample without a label adds no class: %s", error)
    reader.close()
    return tuple(sorted(found))
