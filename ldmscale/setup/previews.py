"""The fixed conditions of the images that are sampled while a diffusion model trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch

from ldmscale.config import DiffusionJob
from ldmscale.data.conditions.annotations import caption_of
from ldmscale.data.latents.format import LatentShape
from ldmscale.data.loading.held_out import bucket_quotas
from ldmscale.data.loading.loader import Batch, MakeItem
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import SampleReader
from ldmscale.diffusion.sample_latents import SamplerOptions
from ldmscale.errors import ConfigError, DataError
from ldmscale.models.conditions import Conditions
from ldmscale.setup.conditions import ConditionReaders
from ldmscale.setup.dataloaders import preview_batches
from ldmscale.setup.index import open_index
from ldmscale.setup.run import Run
from ldmscale.stages.diffusion import Preview, PreviewGroup
from ldmscale.stages.first_stage import FirstStage, batch_conditions

log = logging.getLogger(__name__)
_T = TypeVar("_T")


def open_preview(
    run: Run,
    config: DiffusionJob,
    readers: ConditionReaders,
    make_item: MakeItem,
    first_stage: FirstStage,
    latent_shapes: Sequence[LatentShape],
) -> Preview | None:
    """What is sampled while training; None without preview.every_steps. Collective."""
    chosen = config.preview
    if not chosen.every_steps:
        return None
    if config.spatial is not None or config.embeddings is not None:
        # Made from images or stored arrays, which cannot be written as prompts.
        groups = [
            PreviewGroup(
                tuple(batch["caption" if "caption" in batch else "key"]),
                batch_conditions(batch, first_stage).to("cpu"),
                _latent_shape(batch, config.autoencoder.factor, latent_shapes[0][0]),
            )
            for batch in preview_batches(run, config, make_item)
        ]
    else:
        groups = _by_shape(*_prompts(run, config, readers), run.index, latent_shapes)
    sampler = SamplerOptions(chosen.sampler_steps, chosen.guidance, prediction=config.diffusion.prediction)
    return Preview(tuple(groups), chosen.seed, sampler)


def _latent_shape(batch: Batch, factor: int, channels: int) -> LatentShape:
    """Of the images of a batch, once they are encoded."""
    height, width = batch["image"].shape[-2:]
    return (channels, height // factor, width // factor)


def _by_shape(
    titles: tuple[str, ...], conditions: Conditions, index: Mixture, latent_shapes: Sequence[LatentShape]
) -> list[PreviewGroup]:
    """Prompts have no shape of their own: they take those of the training samples, each as often as these have it."""
    groups, begin = [], 0
    for shape, count in zip(
        latent_shapes, bucket_quotas(index.bucket_counts.sum(axis=0).tolist(), len(titles)), strict=True
    ):
        rows = slice(begin, begin + count)
        if count:
            groups.append(PreviewGroup(titles[rows], conditions.changed(itemgetter(rows)), shape))
        begin += count
    return groups


def _prompts(run: Run, config: DiffusionJob, readers: ConditionReaders) -> tuple[tuple[str, ...], Conditions]:
    """Titles and conditions: the configured prompts, or captions or layouts spread over the held-out shards (else over the
    training shards).

    Prompts of a model that reads labels are classes, spread over all unless given. An unconditional model samples
    preview.images images.
    """
    tokenizer, classes, layout = readers.tokenizer, readers.classes, readers.layout
    if layout is not None:
        boxes = [layout.encode(found) for found in _read_samples(run, config, layout.boxes)]
        titles = tuple(layout.title(tokens) for tokens in boxes)
        return titles, Conditions(token_ids=torch.from_numpy(np.stack(boxes)))
    if classes is not None:
        count = classes.count if classes.names is None else len(classes.names)
        spread = [number * count // config.preview.images for number in range(config.preview.images)]
        try:
            numbers = [classes.number(prompt) for prompt in config.preview.prompts] or spread
        except DataError as error:
            raise ConfigError([f"preview.prompts: {fault}" for fault in error.faults]) from error
        titles = tuple(classes.title(number) for number in numbers)
        return titles, Conditions(labels=torch.tensor(numbers))
    if tokenizer is None:
        return ("",) * config.preview.images, Conditions()
    prompts = config.preview.prompts or _read_samples(
        run, config, lambda members: caption_of(members, config.data.caption)
    )
    tokens = torch.from_numpy(tokenizer.encode(list(prompts)))
    return tuple(prompts), Conditions(token_ids=tokens)


def _read_samples(run: Run, config: DiffusionJob, read: Callable[[Mapping[str, bytes]], _T]) -> list[_T]:
    """Captions or boxes of up to preview.images samples, spread over the shards."""
    index = run.index
    if config.data.heldout_shards is not None:
        index = open_index(config.data.heldout_shards, config.data, run.ranks)
    reader = SampleReader(index)
    chosen = []
    for number in range(config.preview.images):
        shard = number % len(index.shards)
        at = (number // len(index.shards)) * max(1, int(index.counts[shard]) // config.preview.images)
        if at < index.counts[shard]:
            try:
                chosen.append(read(reader.read(shard, at).members))
            except DataError as error:
                log.warning("a sample that cannot be used gives no picture: %s", error)
    reader.close()
    if not chosen:
        raise DataError(
            "no sample for the pictures can be used: give preview.prompts=[...], or preview.every_steps=0"
        )
    return chosen
