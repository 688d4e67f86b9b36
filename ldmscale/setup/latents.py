"""Stage 2: from a checked configuration to shards of latents."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from ldmscale.checkpoint.run_folder import is_foreign, latents_folder
from ldmscale.config import FrozenTextConfig, LatentsJob
from ldmscale.config.inherit import size_warning
from ldmscale.data.latents.format import LatentFormat, LatentManifest, TextFormat
from ldmscale.data.latents.store import LatentPlace, LatentStore, place_of
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.latents.writer import finish_set, is_finished, written_version
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.urls import shard_name, shard_states
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.distributed.environment import Ranks, part
from ldmscale.distributed.preemption import EXIT_STOPPED, StopFlag
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.errors import ConfigError, DataError
from ldmscale.inference.load import load
from ldmscale.models.autoencoder import KLAutoencoder
from ldmscale.models.first_stage import LatentScale, digest
from ldmscale.models.text_encoder import FrozenTextEncoder
from ldmscale.setup.index import open_index, selection_of, shapes_of, storage_of
from ldmscale.setup.node_checks import check_processes, check_shared_memory, usable_workers
from ldmscale.setup.text import open_caption_encoder
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.latents import PREFETCH_CHUNKS, LatentsWork, make_shards
from ldmscale.storage.object_store import AbsentError, ShardState, Storage, StoreError
from ldmscale.tracking.logs import set_up_logging

log = logging.getLogger(__name__)


def encode_latents(config: LatentsJob, ranks: Ranks, stop: StopFlag) -> int:
    """Encode until every shard of the set is finished, by this or another process, and return the exit status."""
    data, chosen, storage = config.data, config.latents, storage_of(config.data)
    place = open_place(chosen.path, storage)
    check_processes(ranks, data.workers)
    world = open_world(ranks)
    folder = latents_folder(chosen.path)
    set_up_logging(folder, ranks)
    if (differs := size_warning(config)) and ranks.is_main:
        log.warning("%s", differs)
    index = open_index(data.shards, data, ranks)
    assert data.image_size is not None
    plain_image = ImageItem(data.image_size, seed=0)
    check_shared_memory(
        ranks, plain_image, batch=chosen.rank_batch, workers=data.workers, prefetch=PREFETCH_CHUNKS
    )
    close_world()
    part(ranks.rank)  # from here on ranks are independent, like those of other launches
    tokenizer = None if chosen.tokenizer is None else Tokenizer.load(chosen.tokenizer, chosen.max_tokens)
    first_stage, stored = open_encoder(config, world.device, data.image_size, tokenizer)
    text = None
    if chosen.text:
        assert isinstance(config.text_encoder, FrozenTextConfig)
        text = open_caption_encoder(config.text_encoder, world.device)
        stored = replace(stored, text=text_format(*text, stored.dtype))
    stored = replace(stored, version=stored_version(place, stored))
    sources = describe_sources(config, index)
    names = [f"{number:05d}.tar" for number in range(len(index.shards))]
    work = LatentsWork(
        reader=SampleReader(index),
        item=ImageItem(
            data.image_size,
            seed=0,
            crop=data.crop,
            max_pixels=data.max_pixels,
            caption_source=data.caption,
            tokenizer=tokenizer,
            decoder=data.decoder,
            shapes=shapes_of(data),
        ),
        first_stage=first_stage,
        format=stored,
        sources=sources,
        ledger=Ledger(folder / "data_ledger.jsonl", ranks.rank),
        text=text,
        batch=chosen.rank_batch,
        workers=usable_workers(data.workers),
        max_bad_share=data.max_bad_share,
    )
    claims = Claims(
        place,
        names,
        lambda number: is_finished(place, names[number], stored, sources[number]),
        timeout_seconds=chosen.claim_timeout_seconds,
        first=ranks.rank * len(names) // ranks.size,
    )
    if not make_shards(work, claims, lambda: stop.requested):
        log.info("stopped: %s", stop.reason)
        return EXIT_STOPPED

    def complete() -> bool:
        try:
            found = LatentManifest.load(str(place), storage)
        except StoreError:
            raise
        except DataError:
            return False
        return found.shards == tuple(names) and found.format == stored

    claims.once(complete, lambda: _log_finished(finish_set(place, names, stored), place, data.image_size))
    return 0


def _log_finished(manifest: LatentManifest, place: LatentPlace, image_size: int | None) -> None:
    log.info(
        "%d latents of %s, images at %d px, in %s (%d samples could not be used); scale factor %.5f",
        manifest.samples,
        "x".join(map(str, manifest.format.shape))
        + (f" and {manifest.format.buckets - 1} other shapes" if manifest.format.buckets > 1 else ""),
        image_size,
        place,
        manifest.skipped,
        manifest.scale_factor,
    )


def open_place(path: str, storage: Storage) -> LatentPlace:
    """The folder or store that the set is written to. Raises ConfigError for a store that cannot be written to."""
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


def stored_version(place: LatentPlace, wanted: LatentFormat) -> int:
    """The version of the format to write: the newest, or that of the shards that are there already.

    Raises DataError where those cannot hold what is asked for.
    """
    found = written_version(place)
    if found == 1 and (wanted.shapes or wanted.text):
        raise DataError(
            f"latents.path={place} holds latents of version 1, which have neither aspect-ratio buckets nor outputs of a text "
            "encoder: give another folder"
        )
    return found or wanted.version


def text_format(encoder: FrozenTextEncoder, tokenizer: EncoderTokenizer, dtype: str) -> TextFormat:
    """How the encoder's outputs are stored."""
    return TextFormat(encoder.digest(), tokenizer.fingerprint, tokenizer.max_tokens, encoder.width, dtype)


def open_encoder(
    config: LatentsJob, device: torch.device, image_size: int, tokenizer: Tokenizer | None
) -> tuple[FirstStage, LatentFormat]:
    parts = load(config.first_stage.path, config.first_stage.average)
    foreign = is_foreign(Path(config.first_stage.path))  # finished as it is; the set itself is measured
    if parts.autoencoder is None or (parts.latent_statistics is None and not foreign):
        expected = (
            "has no autoencoder" if foreign else "is no finished autoencoder run: let it reach its last step"
        )
        raise DataError(f"first_stage.path={config.first_stage.path} {expected}")
    autoencoder = parts.autoencoder
    data, factor = config.data, autoencoder.downsampling
    if image_size % factor:
        raise DataError(f"data.image_size={image_size} is no multiple of the autoencoder's factor {factor}")
    if data.bucket_step is not None and data.bucket_step % factor:
        raise DataError(
            f"data.bucket_step={data.bucket_step} is no multiple of the autoencoder's factor {factor}; give "
            f"data.bucket_step={-(-data.bucket_step // factor) * factor}"
        )
    transform: dict[str, object] = {"size": image_size, "crop": data.crop}
    buckets = shapes_of(data)
    if buckets:
        transform |= {"bucket_step": data.bucket_step, "bucket_max_ratio": data.bucket_max_ratio}
    moments = isinstance(autoencoder, KLAutoencoder) and config.latents.kind == "moments"
    stored = LatentFormat(
        digest(autoencoder),
        "moments" if moments else "latent",
        {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[config.latents.dtype],
        (autoencoder.latent_channels, image_size // factor, image_size // factor),
        transform,
        config.latents.flips,
        None if tokenizer is None else tokenizer.fingerprint,
        tuple((autoencoder.latent_channels, high // factor, wide // factor) for wide, high in buckets),
    )
    channels = autoencoder.latent_channels
    unscaled = LatentScale(torch.zeros(channels), torch.ones(channels))  # moments are stored as they are
    return FirstStage(autoencoder, unscaled, device), stored


def describe_sources(config: LatentsJob, index: Mixture) -> list[dict[str, object]]:
    """The source of each shard of latents, from which a changed shard or selection of images is detected."""
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
