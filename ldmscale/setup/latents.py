"""Stage 2: the source shards, the autoencoder and the place of a latent store."""

from __future__ import annotations

from pathlib import Path

import torch

from ldmscale.checkpoint.run_folder import is_foreign
from ldmscale.config import LatentsJob
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.store import LatentPlace, LatentStore, place_of
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.urls import shard_name, shard_states
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.errors import ConfigError, DataError
from ldmscale.inference.load import load
from ldmscale.models.autoencoder import KLAutoencoder
from ldmscale.models.first_stage import LatentScale, digest
from ldmscale.setup.index import selection_of, storage_of
from ldmscale.stages.first_stage import FirstStage
from ldmscale.storage.object_store import AbsentError, ShardState, Storage, StoreError


def open_place(path: str, storage: Storage) -> LatentPlace:
    """Where the set is written. Raises ConfigError for a store that cannot be written to."""
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


def open_encoder(
    config: LatentsJob, device: object, image_size: int, tokenizer: Tokenizer | None
) -> tuple[FirstStage, LatentFormat]:
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


def describe_sources(config: LatentsJob, index: Mixture) -> list[dict[str, object]]:
    """What each shard of latents is made of: another version of its images, or another choice of them, is noticed."""
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
