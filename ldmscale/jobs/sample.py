"""`ldmscale sample`: draw images for prompts, one PNG each with its parameters inside, and a grid of all."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmscale.config import SampleConfig, SampleJob
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import ConfigError
from ldmscale.jobs.start import configured

log = logging.getLogger(__name__)

GRID_IMAGES = 64  # at most; a grid of thousands is no help


@dataclass(frozen=True)
class Wanted:
    """One image: its file is named after its number, so a half-done set goes on where it stopped."""

    number: int
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:48]
        return f"{self.number:06d}_{words or 'prompt'}_{self.seed}.png"

    def told_with(self, made_by: dict[str, str]) -> dict[str, str]:
        """Everything that its PNG tells."""
        return {"prompt": self.prompt, "seed": str(self.seed), **made_by}


def main(overrides: Sequence[str]) -> int:
    """Draw as configured; see `cli` for the exit status."""
    config, ranks = configured(SampleJob, overrides)
    return _run(config.sample, ranks)


def _run(config: SampleConfig, ranks: Ranks) -> int:
    import torch

    from ldmscale.distributed.collectives import barrier, from_main_rank
    from ldmscale.distributed.world import close_world, open_world
    from ldmscale.parts import load
    from ldmscale.tracking.logs import set_up_logging

    world = open_world(ranks)
    set_up_logging(None, ranks)
    prompts = from_main_rank(lambda: read_prompts(config.prompts))
    wanted = [
        Wanted(number, prompt, config.first_seed + i)
        for number, (prompt, i) in enumerate((p, i) for p in prompts for i in range(config.images_per_prompt))
    ]
    out = Path(config.out) if config.out is not None else Path(config.model) / "samples" / "drawn"
    out.mkdir(parents=True, exist_ok=True)
    made_by = _parameters(config)
    missing = [image for image in wanted if not _is_drawn(out / image.file_name, image, made_by)]
    log.info("%d images for %d prompts, %d of them to be drawn", len(wanted), len(prompts), len(missing))
    barrier()  # every rank has seen the same files before the first new one appears
    parts = load(config.model, config.ema, {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision])
    for part in (parts.denoiser, parts.autoencoder):
        if part is not None:
            part.to(world.device)
    mine = missing[ranks.rank :: ranks.size]
    for start in range(0, len(mine), config.rank_batch):
        _draw(parts, mine[start : start + config.rank_batch], config, made_by, out)
        log.info("%d of %d images of this rank", min(start + config.rank_batch, len(mine)), len(mine))
    barrier()
    if ranks.is_main:
        _write_grid(wanted[:GRID_IMAGES], out, config.images_per_prompt)
        log.info("images and grid.png are in %s", out)
    close_world()
    return 0


def read_prompts(given: str | tuple[str, ...]) -> list[str]:
    """A list as it is; "-" reads standard input, the name of a file its lines; anything else is one prompt.

    Raises ConfigError where there is no prompt.
    """
    if not isinstance(given, str):
        prompts = list(given)
    elif given == "-":
        prompts = [line.strip() for line in sys.stdin]
    elif Path(given).is_file():
        prompts = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines()]
    else:
        prompts = [given]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConfigError(
            "sample.prompts names no prompt: give 'sample.prompts=[a red dragon]', a file, or - for standard input"
        )
    return prompts


def _parameters(config: SampleConfig) -> dict[str, str]:
    """What an image depends on besides its prompt and seed, as its PNG tells it."""
    from ldmscale.checkpoint import newest_checkpoint
    from ldmscale.run_folder import RunFolder

    checkpoint = newest_checkpoint(RunFolder(config.model).checkpoints)
    return {
        "model": str(Path(config.model).absolute()),
        "checkpoint": "" if checkpoint is None else checkpoint.name,
        "ema": str(config.ema),
        "precision": config.precision,
        "sampler": config.sampler,
        "steps": str(config.steps),
        "eta": str(config.eta),
        "guidance": str(config.guidance),
    }


def _is_drawn(path: Path, image: Wanted, made_by: dict[str, str]) -> bool:
    """Whether the file is there, and was drawn for this prompt and seed with these parameters."""
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as drawn:
        told = drawn.info
    return all(told.get(key) == value for key, value in image.told_with(made_by).items())


def _draw(
    parts: object, batch: Sequence[Wanted], config: SampleConfig, made_by: dict[str, str], out: Path
) -> None:
    from PIL import Image, PngImagePlugin

    from ldmscale.parts import Parts
    from ldmscale.sampling import sample
    from ldmscale.stages.pictures import to_uint8

    assert isinstance(parts, Parts)
    images = sample(
        parts,
        [image.prompt for image in batch],
        steps=config.steps,
        sampler=config.sampler,
        guidance=config.guidance,
        seeds=[image.seed for image in batch],
        eta=config.eta,
    )
    for image, pixels in zip(batch, to_uint8(images), strict=True):
        about = PngImagePlugin.PngInfo()
        for key, value in image.told_with(made_by).items():
            about.add_itxt(key, value)
        temporary = out / f".{image.file_name}"
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=about)
        temporary.rename(out / image.file_name)  # a file that is there is whole


def _write_grid(images: Sequence[Wanted], out: Path, images_per_prompt: int) -> None:
    import numpy as np
    from PIL import Image

    from ldmscale.tracking.pictures import tile, write_png

    pixels = np.stack([np.asarray(Image.open(out / image.file_name).convert("RGB")) for image in images])
    columns = images_per_prompt if images_per_prompt > 1 else None
    write_png(out / "grid.png", tile(pixels, columns), [image.prompt for image in images])
