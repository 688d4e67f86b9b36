"""The quickstart's figures: reconstruction of held-out images, and whether samples follow their prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmscale.config import ScoreConfig
from ldmscale.data.conditions.annotations import caption_of
from ldmscale.data.images.decode import decode_image, image_member
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.errors import DataError
from ldmscale.evaluation.metrics import PromptFollowing, mean_psnr, prompt_following, psnr, reconstruct
from ldmscale.inference.load import load
from ldmscale.inference.parts import Parts
from ldmscale.inference.sample import sample
from ldmscale.tracking.images import captioned, to_uint8, write_png

log = logging.getLogger(__name__)

SAMPLE_BATCH = 128


@dataclass(frozen=True)
class RealImages:
    """Images with their captions and classes; the first `trained` were trained on, the others held out."""

    pixels: Tensor  # float [N,3,S,S] in [-1,1]
    keys: list[str]
    captions: list[str]
    classes: list[str]
    trained: int


def score(
    run: Path,
    autoencoder_run: Path,
    train: list[str],
    heldout: list[str],
    image_size: int,
    options: ScoreConfig,
) -> dict[str, Any]:
    """Measure the finished run, draw samples/prompts.png, and return the figures as plain values."""
    real = read_images(train, heldout, image_size)
    autoencoder = load(autoencoder_run).autoencoder
    parts = load(run)
    assert autoencoder is not None and parts.denoiser is not None
    reconstructions = reconstruct(autoencoder, real.pixels)
    quality = psnr(real.pixels, reconstructions)
    total = len(real.captions)
    groups = {"seen": range(real.trained), "heldout": range(real.trained, total)}
    # Each group gives captions by its share, so that a large folder does not take hours.
    chosen = {name: own[:: -(-total // options.max_captions)] for name, own in groups.items()}
    drawn, followed = {}, {}
    for name, own in chosen.items():
        drawn[name] = draw(
            parts, [real.captions[at] for at in own], own, options.sampler_steps, options.guidance
        )
        followed[name] = prompt_following(
            drawn[name], list(own), reconstructions, real.classes, options.nearest
        )
    _draw_sheet(run, real, drawn, followed, chosen, options.grid_prompts)
    return {
        "reconstruction": {
            "psnr_db": mean_psnr(quality[real.trained :].tolist())[0],
            "psnr_db_trained": mean_psnr(quality[: real.trained].tolist())[0],
            "images": total - real.trained,
        },
        "prompt_following": {name: _plain(found) for name, found in followed.items()},
        "sampler": {"steps": options.sampler_steps, "guidance": options.guidance, "name": "ddim"},
        "example_prompt": real.captions[0],
    }


def draw(parts: Parts, captions: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
    """One image for each caption, float [N,3,H,W] in [-1,1], batch by batch."""
    return torch.cat(
        [
            sample(
                parts,
                captions[start : start + SAMPLE_BATCH],
                steps=steps,
                guidance=guidance,
                seeds=seeds[start : start + SAMPLE_BATCH],
            )
            for start in range(0, len(captions), SAMPLE_BATCH)
        ]
    )


def read_images(train: Sequence[str], heldout: Sequence[str], image_size: int) -> RealImages:
    """All images of the shards, at `image_size`; those that cannot be read are left out. `heldout` may be empty."""
    pixels: list[np.ndarray] = []
    keys: list[str] = []
    captions: list[str] = []
    classes: list[str] = []
    trained = 0
    for part, shards in enumerate((train, heldout)):
        if not shards:  # none is held out
            continue
        index = ShardIndex.open(list(shards))
        reader = SampleReader(index)
        for shard, count in enumerate(index.counts.tolist()):
            for number in range(count):
                try:
                    found = reader.read(shard, number)
                    image = decode_image(image_member(found.members)[1], size=image_size)
                except DataError as error:
                    log.warning("not scored: %s", error)
                    continue
                pixels.append(image)
                keys.append(found.key)
                captions.append(caption_of(found.members))
                classes.append(caption_of(found.members, "json:class"))
        reader.close()
        trained = len(captions) if part == 0 else trained
    images = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
    return RealImages(images, keys, captions, classes, trained)


def _plain(found: PromptFollowing) -> dict[str, Any]:
    values = asdict(found)
    del values["nearest_index"]
    return values


def _draw_sheet(
    run: Path,
    real: RealImages,
    drawn: dict[str, Tensor],
    followed: dict[str, PromptFollowing],
    chosen: dict[str, range],
    prompts: int,
) -> None:
    """samples/prompts.png: half seen and half held-out prompts, spread evenly: sample, nearest real image, own image."""
    originals = to_uint8(real.pixels)
    rows = []
    for name, own in chosen.items():
        samples = to_uint8(drawn[name])
        wanted = min(prompts // 2, len(own))
        for number in [len(own) * i // wanted for i in range(wanted)]:
            at = own[number]
            nearest = followed[name].nearest_index[number]
            title = real.captions[at] + ("" if name == "seen" else "  (held out)")
            rows.append((title, [samples[number], originals[nearest], originals[at]]))
    sheet = captioned(rows, ("sample", "nearest real", "its own"))
    write_png(run / "samples" / "prompts.png", sheet, [title for title, _ in rows])
