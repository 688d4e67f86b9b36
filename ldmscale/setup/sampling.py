"""The sample job: images for prompts, one PNG each with its parameters inside, and a grid of the first."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ldmscale import __version__
from ldmscale.checkpoint.manager import newest_checkpoint
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import SampleConfig
from ldmscale.distributed.collectives import from_main_rank, gather_lists
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.errors import ConfigError, DataError, LdmscaleError
from ldmscale.inference.condition_files import conditions_digest
from ldmscale.inference.draw_set import (
    draw_images,
    prepare_set,
    warn_of_late_start,
    warn_of_no_guidance,
    with_trained_shape,
)
from ldmscale.inference.image_set import SampleFolder, file_digest, listing_digest
from ldmscale.inference.load import load
from ldmscale.inference.sample import missing_parts
from ldmscale.tracking.logs import set_up_logging

log = logging.getLogger(__name__)


def sample_set(config: SampleConfig, ranks: Ranks) -> None:
    """Sample the images that are missing in the output folder, shared out over the ranks. Collective."""
    # The ranks meet when all have sampled their share, which may be hours after the first.
    world = open_world(ranks, timeout_minutes=24 * 60.0)
    set_up_logging(None, ranks)
    made_by = parameters(config)
    # Rank 0 looks for missing images alone: the folder changes as soon as a rank samples.
    prompts, out, missing = from_main_rank(lambda: prepare_set(config, made_by))
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
            config = with_trained_shape(config, parts)
            warn_of_late_start(parts, config)
            warn_of_no_guidance(parts, config)
            mine = [wanted[number] for number in missing[ranks.rank :: ranks.size]]
            draw_images(parts, mine, len(missing), config, folder, ranks)
        except LdmscaleError as error:
            fault = error
    shared = _shared_fault(fault)  # the ranks meet here, also those that failed
    if shared is not None:
        if ranks.is_main:
            folder.abandon()
        raise shared
    if ranks.is_main:
        folder.write_grid(wanted, config.images_per_prompt if config.images_per_prompt > 1 else None)
        log.info("images and grid.png are in %s", folder.path)
    close_world()


def _shared_fault(fault: LdmscaleError | None) -> LdmscaleError | None:
    """The faults of all ranks as one error, the same on every rank; None if there are none. Collective."""
    own = [] if fault is None else [(isinstance(fault, (ConfigError, DataError)), str(fault).split("\n"))]
    found = gather_lists(own)
    if not found:
        return None
    texts = list(dict.fromkeys(text for _, lines in found for text in lines))
    users = all(of_user for of_user, _ in found)
    return ConfigError(texts) if users else LdmscaleError("; ".join(texts), shared=True)


def parameters(config: SampleConfig) -> dict[str, str]:
    """The parameters that an image depends on besides its prompt and seed, for its PNG and sample.json."""
    found = {
        "ldmscale": __version__,
        "model": str(Path(config.model).absolute()),
        "checkpoint": _weights(Path(config.model)),
    }
    for name in ("ema", "precision", "sampler", "spacing", "steps", "eta", "guidance", "guidance_rescale",
                 "height", "width", "strength", "images_per_prompt", "first_seed", "distinct_seeds"):  # fmt: skip
        value = getattr(config, name)
        found[name] = "" if value is None else str(value)
    if config.aspect_ratio is not None:
        found["aspect_ratio"] = str(config.aspect_ratio)
    if config.spatial_guidance != 1:
        found["spatial_guidance"] = str(config.spatial_guidance)
    for name in ("image", "mask"):
        path = getattr(config, name)
        found[name] = "" if path is None else f"{path} ({file_digest(path)})"
    if config.condition is not None:
        found["condition"] = conditions_digest(config.condition)
    return found


def _weights(model: Path) -> str:
    """Identifies the weights of a model: the checkpoint's name and manifest, or the files of other formats."""
    run = RunFolder(model)
    given = model if (model / "COMPLETE").is_file() else None
    checkpoint = given or (newest_checkpoint(run.checkpoints) if run.config_file.is_file() else None)
    if checkpoint is None:
        return f"{model.name} ({listing_digest(model)})"
    return f"{checkpoint.name} ({file_digest(checkpoint / 'manifest.json')})"
