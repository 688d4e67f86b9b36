"""Draws a set of images: resumable, sharded over ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ldmscale.config import SampleConfig
from ldmscale.data.images.buckets import nearest_ratio
from ldmscale.data.images.decode import rgb_image
from ldmscale.diffusion.timesteps import path_of
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import ConfigError, DataError
from ldmscale.inference.condition_files import Told, faults_of_files
from ldmscale.inference.image_set import Prompts, SampleFolder, Wanted, free_folder
from ldmscale.inference.parts import Parts
from ldmscale.inference.prompts import (
    faults_of_classes,
    prompts_of_conditions,
    read_negatives,
    read_prompts,
    run_of,
)
from ldmscale.inference.sample import sample
from ldmscale.tracking.console import ProgressDisplay
from ldmscale.tracking.images import to_uint8

log = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


def prepare_set(config: SampleConfig, made_by: dict[str, str]) -> tuple[Prompts, Path, list[int]]:
    """Prompts, folder and what is missing in it."""
    texts = (
        prompts_of_conditions(config) if config.condition is not None else read_prompts(config.prompts or "")
    )
    prompts = Prompts(texts, read_negatives(config.negative_prompts, len(texts)))
    faults, run = faults_of_classes(Path(config.model), texts), run_of(Path(config.model))
    if config.condition is not None and run is not None:
        faults += faults_of_files(config.condition, run.config().get("spatial"))
    if faults:
        raise ConfigError(faults)
    if config.out is None:
        beside = Path(config.model) if run is None else run.path
        folder = free_folder(beside / "samples", made_by, prompts)
    else:
        folder = SampleFolder(Path(config.out), made_by)
        folder.settle(prompts)
    wanted = prompts.images(config.images_per_prompt, config.first_seed, config.distinct_seeds)
    return prompts, folder.path, folder.missing(wanted)


def draw_images(
    parts: Parts,
    mine: Sequence[Wanted],
    total: int,
    config: SampleConfig,
    folder: SampleFolder,
    ranks: Ranks,
) -> None:
    """Draw this rank's images, `rank_batch` at a time; rank 0 shows how far all are, taking the others to be as fast."""
    image, mask = read_init_image(parts, config)
    told = None
    if config.condition is not None:
        told = Told(parts, config.condition, config.images_per_prompt, config.decode_tile_pixels)
    display = ProgressDisplay(total, "images") if ranks.is_main else None
    began = said = time.monotonic()
    if display is not None:
        display.start()
    batches: Sequence[Sequence[Wanted]]
    batches = [mine[start : start + config.rank_batch] for start in range(0, len(mine), config.rank_batch)]
    if told is not None:
        batches = told.of_one_size(mine, config.rank_batch)
    drawn = 0
    for batch in batches:
        images = sample(
            parts,
            [wanted.prompt for wanted in batch],
            steps=config.steps,
            sampler=config.sampler,
            guidance=config.guidance,
            seeds=[wanted.seed for wanted in batch],
            eta=config.eta,
            conditions=None if told is None else told.conditions(batch),
            negative_prompts=[wanted.negative for wanted in batch],
            guidance_rescale=config.guidance_rescale,
            spacing=config.spacing,
            height=config.height,
            width=config.width,
            image=image,
            strength=config.strength,
            mask=mask,
            decode_tile_pixels=config.decode_tile_pixels,
            spatial_guidance=config.spatial_guidance,
        )
        whole = images if told is None else told.finished(batch, images)
        for wanted, pixels in zip(batch, to_uint8(whole), strict=True):
            folder.write(wanted, pixels)
        drawn += len(batch)
        if display is None:
            continue
        now, done = time.monotonic(), min(drawn * ranks.size, total)
        display.advance(done)
        if now - said >= PLAIN_LINE_SECONDS or done == total:
            display.show(done, {"throughput/images_per_second": done / max(now - began, 1e-9)})
            said = now
    if display is not None:
        display.close()


def with_trained_shape(config: SampleConfig, parts: Parts) -> SampleConfig:
    """The configuration with the height and width that `aspect_ratio` stands for.

    Raises ConfigError where the model was trained at one shape.
    """
    if config.aspect_ratio is None:
        return config
    assert parts.autoencoder is not None
    if not parts.latent_shapes:
        raise ConfigError(
            f"sample.aspect_ratio={config.aspect_ratio:g}, but the model was trained without aspect-ratio buckets: give "
            "sample.height and sample.width"
        )
    factor: int = parts.autoencoder.downsampling
    sizes = [(width * factor, height * factor) for _, height, width in parts.latent_shapes]
    wide, high = sizes[nearest_ratio(config.aspect_ratio, sizes)]
    log.info(
        "images of %dx%d pixels, the trained shape nearest to the ratio %g", wide, high, config.aspect_ratio
    )
    return replace(config, width=wide, height=high, aspect_ratio=None)


def warn_of_late_start(parts: Parts, config: SampleConfig) -> None:
    """Noise that a network is told is only partly noise gives washed-out images: say so."""
    if parts.schedule is None:
        return  # `sample` says what is missing
    try:
        first = path_of(config.sampler, parts.schedule, config.steps, config.spacing).timesteps[0]
    except ValueError:
        return  # `sample` says what cannot be
    last = parts.schedule.timesteps - 1
    if first < 0.9 * last:
        log.warning(
            "sample.steps=%d of the leading spacing begins at timestep %d of %d: images will be washed out; give "
            "sample.spacing=trailing, or another number of steps",
            config.steps, first, last,
        )  # fmt: skip


def warn_of_no_guidance(parts: Parts, config: SampleConfig) -> None:
    """A model that reads a condition and has none that says nothing is drawn from as it was trained: say so."""
    if config.guidance == 1 or parts.denoiser is None or parts.denoiser.has_null:
        return
    if parts.denoiser.unet.context_dim is not None:
        log.warning(
            "sample.guidance=%g has no effect: the model has no null condition to move away from (class_embedder.null_class)",
            config.guidance,
        )


def read_init_image(parts: Parts, config: SampleConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`image` as float [1,3,H,W] in [-1,1] and `mask` as float [1,1,H,W], scaled and cut to the size that is drawn."""
    if config.image is None:
        return None, None
    assert parts.latent_shape and parts.autoencoder
    factor: int = parts.autoencoder.downsampling
    width = config.width or parts.latent_shape[2] * factor
    height = config.height or parts.latent_shape[1] * factor

    def pixels(path: str, mode: str, method: Image.Resampling) -> torch.Tensor:
        try:
            upright = rgb_image(Path(path).read_bytes()).convert(mode)
        except (OSError, DataError) as error:
            raise ConfigError(f"{path} cannot be read as an image: {error}") from error
        fitted = np.array(ImageOps.fit(upright, (width, height), method))
        return torch.from_numpy(fitted).reshape(height, width, -1).permute(2, 0, 1)[None].float()

    image = pixels(config.image, "RGB", Image.Resampling.BICUBIC) / 127.5 - 1
    if config.mask is None:
        return image, None
    return image, pixels(config.mask, "L", Image.Resampling.NEAREST) / 255
