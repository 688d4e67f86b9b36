"""`ldmscale sample`: draw images for prompts, one PNG each with its parameters inside, and a grid of the first."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldmscale import __version__
from ldmscale.config import SampleConfig, SampleJob
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import ConfigError, DataError, LdmscaleError
from ldmscale.jobs.sample_prompts import (
    faults_of_classes,
    prompts_of_conditions,
    read_negatives,
    read_prompts,
    run_of,
)
from ldmscale.jobs.start import configured

if TYPE_CHECKING:
    import torch

    from ldmscale.jobs.sample_set import Prompts, SampleFolder, Wanted
    from ldmscale.parts import Parts

log = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


def main(overrides: Sequence[str]) -> int:
    """Draw as configured; see `cli` for the exit status."""
    config, ranks = configured(SampleJob, overrides)
    return _run(config.sample, ranks)


def _run(config: SampleConfig, ranks: Ranks) -> int:
    import torch

    from ldmscale.distributed.collectives import from_main_rank
    from ldmscale.distributed.world import close_world, open_world
    from ldmscale.jobs.sample_set import SampleFolder
    from ldmscale.parts import load
    from ldmscale.sampling import missing_parts
    from ldmscale.tracking.logs import set_up_logging

    # The ranks meet when all have drawn their share, which may be hours after the first.
    world = open_world(ranks, timeout_minutes=24 * 60.0)
    set_up_logging(None, ranks)
    made_by = parameters(config)
    # Rank 0 looks alone: its answer stands, whatever the others draw meanwhile.
    prompts, out, missing = from_main_rank(lambda: _settle(config, made_by))
    folder = SampleFolder(out, made_by)
    wanted = prompts.images(config.images_per_prompt, config.first_seed, config.distinct_seeds)
    log.info(
        "%d images for %d prompts, %d of them to be drawn", len(wanted), len(prompts.texts), len(missing)
    )
    fault: LdmscaleError | None = None
    if missing:
        try:
            parts = load(
                config.model, config.ema, {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
            )
            for part in (parts.denoiser, parts.text_encoder, parts.autoencoder):
                if part is not None:
                    part.to(world.device)
            if faults := missing_parts(parts, prompted=parts.layout is None):
                raise ConfigError(faults)
            _warn_of_late_start(parts, config)
            _warn_of_no_guidance(parts, config)
            mine = [wanted[number] for number in missing[ranks.rank :: ranks.size]]
            _draw(parts, mine, len(missing), config, folder, ranks)
        except LdmscaleError as error:
            fault = error
    told = _faults_of_ranks(fault)  # the ranks meet here, also those that could not draw their share
    if told is not None:
        if ranks.is_main:
            folder.abandon()
        raise told
    if ranks.is_main:
        folder.write_grid(wanted, config.images_per_prompt if config.images_per_prompt > 1 else None)
        log.info("images and grid.png are in %s", folder.path)
    close_world()
    return 0


def _faults_of_ranks(fault: LdmscaleError | None) -> LdmscaleError | None:
    """What kept any rank from drawing its share, as one error that is the same on all. Collective."""
    from ldmscale.distributed.collectives import gather_lists

    own = [] if fault is None else [(isinstance(fault, (ConfigError, DataError)), str(fault).split("\n"))]
    told = gather_lists(own)
    if not told:
        return None
    texts = list(dict.fromkeys(text for _, lines in told for text in lines))
    users = all(of_user for of_user, _ in told)
    error = ConfigError(texts) if users else LdmscaleError("; ".join(texts))
    error.shared = True
    return error


def parameters(config: SampleConfig) -> dict[str, str]:
    """What an image depends on besides its prompt and seed, as its PNG and sample.json tell it."""
    from ldmscale.jobs.sample_conditions import conditions_digest
    from ldmscale.jobs.sample_set import file_digest

    told = {
        "ldmscale": __version__,
        "model": str(Path(config.model).absolute()),
        "checkpoint": _weights(Path(config.model)),
    }
    for name in ("ema", "precision", "sampler", "spacing", "steps", "eta", "guidance", "guidance_rescale",
                 "height", "width", "strength", "images_per_prompt", "first_seed", "distinct_seeds"):  # fmt: skip
        value = getattr(config, name)
        told[name] = "" if value is None else str(value)
    if config.spatial_guidance != 1:
        told["spatial_guidance"] = str(config.spatial_guidance)
    for name in ("image", "mask"):
        path = getattr(config, name)
        told[name] = "" if path is None else f"{path} ({file_digest(path)})"
    if config.condition is not None:
        told["condition"] = conditions_digest(config.condition)
    return told


def _weights(model: Path) -> str:
    """What tells the weights of a model from others: the checkpoint's name and manifest, or the files of other formats."""
    from ldmscale.checkpoint import newest_checkpoint
    from ldmscale.jobs.sample_set import file_digest, listing_digest
    from ldmscale.run_folder import RunFolder

    run = RunFolder(model)
    given = model if (model / "COMPLETE").is_file() else None
    checkpoint = given or (newest_checkpoint(run.checkpoints) if run.config_file.is_file() else None)
    if checkpoint is None:
        return f"{model.name} ({listing_digest(model)})"
    return f"{checkpoint.name} ({file_digest(checkpoint / 'manifest.json')})"


def _settle(config: SampleConfig, made_by: dict[str, str]) -> tuple[Prompts, Path, list[int]]:
    """Prompts, folder and what is missing in it."""
    from ldmscale.jobs.sample_conditions import faults_of_files
    from ldmscale.jobs.sample_set import Prompts, SampleFolder, free_folder

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


def _draw(
    parts: Parts,
    mine: Sequence[Wanted],
    total: int,
    config: SampleConfig,
    folder: SampleFolder,
    ranks: Ranks,
) -> None:
    """Draw this rank's images, `rank_batch` at a time; rank 0 shows how far all are, taking the others to be as fast."""
    from ldmscale.jobs.sample_conditions import Told
    from ldmscale.sampling import sample
    from ldmscale.stages.pictures import to_uint8
    from ldmscale.tracking.console import ProgressDisplay

    image, mask = _given_picture(parts, config)
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


def _warn_of_late_start(parts: Parts, config: SampleConfig) -> None:
    """Noise that a network is told is only partly noise gives washed-out images: say so."""
    from ldmscale.diffusion.spacing import path_of

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


def _warn_of_no_guidance(parts: Parts, config: SampleConfig) -> None:
    """A model that reads a condition and has none that says nothing is drawn from as it was trained: say so."""
    if config.guidance == 1 or parts.denoiser is None or parts.denoiser.has_null:
        return
    if parts.denoiser.unet.context_dim is not None:
        log.warning(
            "sample.guidance=%g has no effect: the model has no null condition to move away from (class_embedder.null_class)",
            config.guidance,
        )


def _given_picture(parts: Parts, config: SampleConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`image` as float [1,3,H,W] in [-1,1] and `mask` as float [1,1,H,W], scaled and cut to the size that is drawn."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    if config.image is None:
        return None, None
    assert parts.latent_shape and parts.autoencoder
    factor: int = parts.autoencoder.downsampling
    width = config.width or parts.latent_shape[2] * factor
    height = config.height or parts.latent_shape[1] * factor

    def pixels(path: str, mode: str, method: Image.Resampling) -> torch.Tensor:
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert(mode)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read as a picture: {error}") from error
        fitted = np.array(ImageOps.fit(upright, (width, height), method))
        return torch.from_numpy(fitted).reshape(height, width, -1).permute(2, 0, 1)[None].float()

    image = pixels(config.image, "RGB", Image.Resampling.BICUBIC) / 127.5 - 1
    if config.mask is None:
        return image, None
    return image, pixels(config.mask, "L", Image.Resampling.NEAREST) / 255
