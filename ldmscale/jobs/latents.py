"""`ldmscale latents`: encode shards of images into shards of latents, with whoever else is at it. See `stages.latents`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldmscale.config import LatentsJob
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.parting import part
from ldmscale.distributed.stop import EXIT_STOPPED, StopFlag
from ldmscale.errors import ConfigError, DataError
from ldmscale.jobs.start import configured

if TYPE_CHECKING:
    from ldmscale.data.latent_store import LatentPlace
    from ldmscale.data.latents import LatentFormat, LatentManifest
    from ldmscale.data.mixture import Mixture
    from ldmscale.data.storage import Storage
    from ldmscale.data.tokens import Tokenizer
    from ldmscale.stages.first_stage import FirstStage

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Encode as configured; see `cli` for the exit status."""
    config, ranks = configured(LatentsJob, overrides)
    with StopFlag().install() as stop:
        return _run(config, ranks, stop)


def _run(config: LatentsJob, ranks: Ranks, stop: StopFlag) -> int:
    from ldmscale.data.claims import Claims
    from ldmscale.data.items import ImageItem
    from ldmscale.data.latent_shards import finish_set, is_finished
    from ldmscale.data.latents import LatentManifest
    from ldmscale.data.ledger import Ledger
    from ldmscale.data.samples import SampleReader
    from ldmscale.data.storage import StoreError
    from ldmscale.data.tokens import Tokenizer
    from ldmscale.distributed.world import close_world, open_world
    from ldmscale.jobs.open_index import open_index, storage_of
    from ldmscale.run_folder import latents_folder
    from ldmscale.stages.latents import LatentsWork, make_shards
    from ldmscale.tracking.logs import set_up_logging

    data, chosen = config.data, config.latents
    place = _place(chosen.path, storage_of(data))
    world = open_world(ranks)
    folder = latents_folder(chosen.path)
    set_up_logging(folder, ranks)
    index = open_index(data.shards, data, ranks)
    close_world()
    part(ranks.rank)  # from here on ranks are strangers to each other, like those of other launches
    assert data.image_size is not None
    tokenizer = None if chosen.tokenizer is None else Tokenizer.load(chosen.tokenizer, chosen.max_tokens)
    first_stage, stored = _open(config, world.device, data.image_size, tokenizer)
    sources = _sources(config, index)
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


def _place(path: str, storage: Storage) -> LatentPlace:
    """Where the set is written. Raises ConfigError for a store that cannot be written to."""
    from ldmscale.data.latent_store import LatentStore, place_of
    from ldmscale.data.storage import AbsentError, StoreError

    place = place_of(path, storage)
    if isinstance(place, LatentStore):
        try:
            place.store.check()
        except AbsentError as error:
            raise ConfigError(
                f"latents.path={path}: there is no such bucket; make it, or give another"
            ) from error
        except StoreError as error:
            raise ConfigError(f"latents.path={path} cannot be written: {error}") from error
    return place


def _told(manifest: LatentManifest, place: LatentPlace) -> None:
    log.info(
        "%d latents in %s (%d samples could not be used); scale factor %.5f",
        manifest.samples, place, manifest.skipped, manifest.scale_factor,
    )  # fmt: skip


def _open(
    config: LatentsJob, device: object, image_size: int, tokenizer: Tokenizer | None
) -> tuple[FirstStage, LatentFormat]:
    import torch

    from ldmscale.data.latents import LatentFormat
    from ldmscale.models.autoencoder import KLAutoencoder
    from ldmscale.parts import load
    from ldmscale.run_folder import is_foreign
    from ldmscale.stages.first_stage import FirstStage, digest
    from ldmscale.stages.latent_scale import LatentScale

    assert isinstance(device, torch.device)
    parts = load(config.first_stage.path, config.first_stage.average)
    foreign = is_foreign(Path(config.first_stage.path))  # finished as it is; the set itself is measured
    if parts.autoencoder is None or (parts.latent_statistics is None and not foreign):
        expected = (
            "has no autoencoder" if foreign else "is no finished autoencoder run: let it reach its last step"
        )
        raise DataError(f"first_stage.path={config.first_stage.path} {expected}")
    autoencoder = parts.autoencoder
    if image_size % autoencoder.downsampling:
        raise DataError(
            f"data.image_size={image_size} is no multiple of the autoencoder's factor {autoencoder.downsampling}"
        )
    side = image_size // autoencoder.downsampling
    moments = isinstance(autoencoder, KLAutoencoder) and config.latents.kind == "moments"
    stored = LatentFormat(
        digest(autoencoder),
        "moments" if moments else "latent",
        {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[config.latents.dtype],
        (autoencoder.latent_channels, side, side),
        {"size": image_size, "crop": config.data.crop},
        config.latents.flips,
        None if tokenizer is None else tokenizer.fingerprint,
    )
    channels = autoencoder.latent_channels
    unscaled = LatentScale(torch.zeros(channels), torch.ones(channels))  # moments are stored as they are
    return FirstStage(autoencoder, unscaled, device), stored


def _sources(config: LatentsJob, index: Mixture) -> list[dict[str, object]]:
    """What each shard of latents is made of: another version of its images, or another choice of them, is noticed."""
    from ldmscale.data.shards import ShardState, shard_name, shard_states
    from ldmscale.jobs.open_index import selection_of, storage_of

    data, selection = config.data, selection_of(config.data)
    sources: list[dict[str, object]] = []
    for number, state in enumerate(shard_states(index.shards, storage_of(data))):
        if not isinstance(state, ShardState):
            raise DataError(f"shard {index.shards[number]} cannot be found: {state}; check data.shards")
        sources.append(
            {
                "name": shard_name(index.shards[number]),
                "size": state.size,
                "version": state.version,
                "samples": int(index.counts[number]),
                "selection": None if selection.everything else selection.key,
                "caption": data.caption,
                "decoder": data.decoder,
            }
        )
    return sources
