"""The index job: make or check the index of shards, and list what is damaged."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace

from ldmscale.config import ClassEmbedderConfig, IndexJob, LayoutConfig
from ldmscale.data.conditions.validation import Classes, ConditionChecks
from ldmscale.data.loading.skipped_samples import FREE_FAULTS
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.report import IndexReport, check_shards
from ldmscale.data.shards.urls import expand
from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.errors import DataError
from ldmscale.setup.classes import FOUND, class_labels
from ldmscale.setup.index import embeddings_reader, selection_of, sets_of, storage_of
from ldmscale.tracking.logs import set_up_logging

log = logging.getLogger(__name__)

SHOWN = 50  # damages listed one by one on the console


def index_shards(config: IndexJob, ranks: Ranks) -> int:
    """Index as configured and return the exit status: 0 if every sample can be used, 2 if something is damaged."""
    set_up_logging(None, ranks)
    if ranks.size > 1:
        open_world(ranks, timeout_minutes=24 * 60)  # ranks end hours apart on a large set
    data, storage, selection = config.data, storage_of(config.data), selection_of(config.data)
    conditions = conditions_of(config)
    sets = sets_of(data.shards)
    shards = list(
        dict.fromkeys(
            url
            for each in sets
            for url in expand(each.shards, allow_pipe=data.allow_pipe, storage=storage, absent=True)
        )
    )

    def look(rank: int, world: int) -> IndexReport:
        return check_shards(
            shards,
            data.check,
            caption_source=data.caption,
            max_pixels=data.max_pixels,
            rank=rank,
            world=world,
            selection=None if selection.everything else selection,
            storage=storage,
            conditions=conditions,
        )

    faults: list[str] = []
    try:
        report = look(ranks.rank, ranks.size)
    except DataError as error:
        faults = list(error.faults)
    if faults := gather_lists(faults):  # a rank that gave up must not leave the others waiting
        raise DataError(faults, shared=True)
    if ranks.size > 1:
        report = look(0, 1)  # every shard's record is there now
        close_world()
    if not ranks.is_main:
        return 0
    found = report.to_json()
    for damage in found.pop("damage")[:SHOWN]:
        log.warning("%(kind)s: %(shard)s %(key)s: %(detail)s", damage)
    sys.stdout.write(
        json.dumps(found, indent=2) + "\n"
    )  # a report to be read by programs; the log goes to stderr
    gone = report.damage_counts.keys() & {"missing_shard", "unreadable_shard"}
    if report.samples and report.selected != 0 and not gone:  # training wants all of them
        Mixture.open(sets, allow_pipe=data.allow_pipe, selection=selection, storage=storage)
    if report.damaged:
        log.error(
            "%d damages in %d shards: training %s; make the shards anew, or %s",
            report.damaged,
            report.shards,
            "refuses a set of which a shard is missing or unreadable"
            if gone
            else _verdict(report, data.max_bad_share),
            "leave those out of data.shards" if gone else "live with it",
        )
        return 2
    if report.selected == 0:
        log.error("no sample is selected: %s", json.dumps(found["dropped"]))
        return 2
    return 0


def conditions_of(config: IndexJob) -> ConditionChecks | None:
    """The checks of conditions besides captions; None: there are none.

    Raises ConfigError where a file of names cannot be used.
    """

    def classes(section: str, source: str, of: ClassEmbedderConfig | LayoutConfig | None) -> Classes | None:
        if of is None:
            return None
        return Classes(source, None if of.names == FOUND else class_labels(source, section, of, list))

    data, spatial = config.data, config.spatial
    found = ConditionChecks(
        labels=classes("class_embedder", data.label, config.class_embedder),
        boxes=classes("layout", data.boxes, config.layout),
        embeddings=embeddings_reader(config.embeddings),
    )
    if spatial is not None and spatial.kind == "map":
        found = replace(found, map_member=spatial.map_member, map_classes=spatial.map_classes)
    return None if found.nothing else found


def _verdict(report: IndexReport, max_bad_share: float) -> str:
    """What training does with such samples: the limit that stops it is compared with what was found."""
    unusable = report.unusable
    share = unusable / max(1, report.samples if report.selected is None else report.selected)
    if unusable <= FREE_FAULTS or share <= max_bad_share:
        return "skips such samples and writes them to data_ledger.jsonl"
    captions = report.damage_counts.get("bad_caption", 0) + report.damage_counts.get("empty_member", 0)
    remedy = "; data.min_caption_words=1 leaves out those without a caption" if captions else ""
    return (
        f"stops, since {share:.1%} of the samples cannot be used, more than data.max_bad_share={max_bad_share:.1%} of them"
        f"{remedy}; a larger data.max_bad_share skips them"
    )
