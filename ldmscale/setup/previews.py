"""The conditions of the images that a training run samples as it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch

from ldmscale.config import DiffusionJob
from ldmscale.data.conditions.annotations import ClassLabels, caption_of
from ldmscale.data.conditions.boxes import LayoutTokens
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.data.tokenizers.pretrained import EncoderTokenizer
from ldmscale.errors import ConfigError, DataError
from ldmscale.models.conditions import Conditions
from ldmscale.setup.index import open_index
from ldmscale.setup.run import Run
from ldmscale.stages.diffusion import PreviewConditions
from ldmscale.stages.first_stage import FirstStage, batch_conditions
from ldmscale.train.stage import Batch

log = logging.getLogger(__name__)
_T = TypeVar("_T")


def preview_conditions(
    config: DiffusionJob,
    run: Run,
    tokenizer: Tokenizer | EncoderTokenizer | None,
    classes: ClassLabels | None,
    layout: LayoutTokens | None = None,
) -> PreviewConditions:
    """The configured prompts, or captions or layouts spread over the held-out shards (else over the training shards).

    Prompts of a model that reads labels are classes, spread over all unless given. A model that reads none of these draws
    as many pictures of its own choice.
    """
    seed = config.preview.seed
    if layout is not None:
        boxes = [layout.encode(found) for found in _some(config, run, layout.boxes)]
        shown = tuple(layout.title(tokens) for tokens in boxes)
        return PreviewConditions(shown, Conditions(token_ids=torch.from_numpy(np.stack(boxes))), seed)
    if classes is not None:
        count = classes.count if classes.names is None else len(classes.names)
        spread = [number * count // config.preview.images for number in range(config.preview.images)]
        try:
            numbers = [classes.number(prompt) for prompt in config.preview.prompts] or spread
        except DataError as error:
            raise ConfigError([f"preview.prompts: {fault}" for fault in error.faults]) from error
        titles = tuple(classes.title(number) for number in numbers)
        return PreviewConditions(titles, Conditions(labels=torch.tensor(numbers)), seed)
    if tokenizer is None:
        return PreviewConditions(("",) * config.preview.images, Conditions(), seed)
    prompts = config.preview.prompts or _some(
        config, run, lambda members: caption_of(members, config.data.caption)
    )
    tokens = torch.from_numpy(tokenizer.encode(list(prompts)))
    return PreviewConditions(tuple(prompts), Conditions(token_ids=tokens), seed)


def preview_of_samples(config: DiffusionJob, batch: Batch, first_stage: FirstStage) -> PreviewConditions:
    """What the given samples tell the model: spatial conditions are made of images, nobody can write them down."""
    conditions = batch_conditions(batch, first_stage).to("cpu")
    return PreviewConditions(tuple(batch.get("caption", batch["key"])), conditions, config.preview.seed)


def _some(config: DiffusionJob, run: Run, told: Callable[[Mapping[str, bytes]], _T]) -> list[_T]:
    """What as many samples as there are pictures tell, captions or boxes."""
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
                chosen.append(told(reader.read(shard, at).members))
            except DataError as error:
                log.warning("a sample that cannot be used gives no picture: %s", error)
    reader.close()
    if not chosen:
        raise DataError(
            "no sample for the pictures can be used: give preview.prompts=[...], or preview.every_steps=0"
        )
    return chosen
