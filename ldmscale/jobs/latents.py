"""`ldmscale latents`: encode shards of images into shards of latents, with whoever else is at it. See `stages.latents`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldmscale.config import LatentsJob
from ldmscale.config.load import configured
from ldmscale.distributed.environment import Ranks, part
from ldmscale.distributed.preemption import EXIT_STOPPED, StopFlag
from ldmscale.errors import DataError

if TYPE_CHECKING:
    from ldmscale.data.latents.format import LatentManifest
    from ldmscale.data.latents.store import LatentPlace

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Encode as configured; see `cli` for the exit status."""
    config, ranks = configured(LatentsJob, overrides)
    with StopFlag().install() as stop:
        return _run(config, ranks, stop)


def _run(config: LatentsJob, ranks: Ranks, stop: StopFlag) -> int:
    from ldmscale.checkpoint.run_folder import latents_folder
    from ldmscale.data.latents.format import LatentManifest
    from ldmscale.data.latents.work_queue import Claims
    from ldmscale.data.latents.writer import finish_set, is_finished
    from ldmscale.data.loading.skipped_samples import Ledger
    from ldmscale.data.loading.transforms import ImageItem
    from ldmscale.data.shards.reader import SampleReader
    from ldmscale.data.tokenizers.bert import Tokenizer
    from ldmscale.distributed.process_group import close_world, open_world
    from ldmscale.setup.index import open_index, storage_of
    from ldmscale.setup.latents import describe_sources, open_encoder, open_place
    from ldmscale.stages.latents import LatentsWork, make_shards
    from ldmscale.storage.object_store import StoreError
    from ldmscale.tracking.logs import set_up_logging

    data, chosen = config.data, config.latents
    place = open_place(chosen.path, storage_of(data))
    world = open_world(ranks)
    folder = latents_folder(chosen.path)
    set_up_logging(folder, ranks)
    index = open_index(data.shards, data, ranks)
    close_world()
    part(ranks.rank)  # from here on ranks are strangers to each other, like those of other launches
    assert data.image_size is not None
    tokenizer = None if chosen.tokenizer is None else Tokenizer.load(chosen.tokenizer, chosen.max_tokens)
    first_stage, stored = open_encoder(config, world.device, data.image_size, tokenizer)
    sources = describe_sources(config, index)
    names = [f"{number:05d}.tar" for number in range(len(index.shards))]
    work = LatentsWork(
        SampleReader(index),
        ImageItem(
            data.image_size,
            0,
            data.crop,
            False,
            data.max_pixels,
            data.caption,
            tokenizer,
            decoder=data.decoder,
        ),
        first_stage,
        stored,
        sources,
        Ledger(folder / "data_ledger.jsonl", ranks.rank),
        chosen.rank_batch,
        data.workers,
        data.max_bad_share,
    )
    claims = Claims(
        place,
        names,
        lambda number: is_finished(place, names[number], stored, sources[number]),
        timeout_seconds=chosen.claim_timeout_seconds,
        first=ranks.rank * len(names) // ranks.size,
    )
    if not make_shards(work, claims, lambda: stop.requested):
        log.info("stopped (%s); finished shards stay, the same command goes on", stop.reason)
        return EXIT_STOPPED

    def complete() -> bool:
        try:
            found = LatentManifest.load(str(place), storage_of(data))
        except StoreError:
            raise
        except DataError:
            return False
        return found.shards == tuple(names) and found.format == stored

    claims.once(complete, lambda: _told(finish_set(place, names, stored), place))
    return 0


def _told(manifest: LatentManifest, place: LatentPlace) -> None:
    log.info(
        "%d latents in %s (%d samples could not be used); scale factor %.5f",
        manifest.samples, place, manifest.skipped, manifest.scale_factor,
    )  # fmt: skip
