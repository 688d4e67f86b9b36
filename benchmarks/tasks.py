"""Whether a small task model follows its condition: trains it on the quickstart's sprites and measures one figure.

    python -m benchmarks.tasks superres_small runs/quickstart      after `make quickstart`

superres_small: PSNR of held-out sprites enlarged from 8 to 32 pixels, beside Pillow's bicubic enlargement and the
first stage's own reconstruction, which bounds it. inpainting_small: PSNR inside the hole, beside filling it with
the mean colour around it. Training goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldmscale import load, sample
from ldmscale.data.items import ImageItem
from ldmscale.data.loader import Loader
from ldmscale.data.mixture import Mixture, WeightedShards
from ldmscale.data.spatial import Holes, SmallImages
from ldmscale.launcher import launch
from ldmscale.stages.conditions import batch_conditions
from ldmscale.stages.first_stage import FirstStage

TASKS = ("superres_small", "inpainting_small")
SIZE, FACTOR, BATCH = 32, 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("quickstart", type=Path, help="run folder of a finished quickstart")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=96, help="held-out sprites that are drawn, at most")
    parser.add_argument("--steps", type=int, default=30, help="of the sampler")
    parser.add_argument("overrides", nargs="*", help="of the training, such as train.max_steps=20")
    given = parser.parse_args()
    source = given.quickstart.absolute()
    run = Path("runs") / given.task
    status = launch(
        [
            "diffusion", f"experiment={given.task}", f"data.shards='{source}/data/train-*.tar'",
            f"data.heldout_shards='{source}/data/heldout-*.tar'", f"first_stage.path='{source}/autoencoder'",
            f"run.dir={run}", *given.overrides,
        ],
        given.ranks,
    )  # fmt: skip
    if status:
        raise SystemExit(status)
    figures = measure(given.task, run, str(source / "data" / "heldout-*.tar"), given.images, given.steps)
    (run / "task.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


@torch.no_grad()
def measure(task: str, run: Path, shards: str, images: int, steps: int) -> dict[str, Any]:
    """The task's figure over held-out sprites, each drawn once with a seed of its own."""
    parts = load(run)
    assert parts.autoencoder and parts.scale
    first_stage = FirstStage(parts.autoencoder, parts.scale, torch.device("cpu"))
    spatial = SmallImages(FACTOR) if task == "superres_small" else Holes()
    index = Mixture.open([WeightedShards(shards)], build_missing=True)
    count = min(images, index.total) // BATCH * BATCH or min(images, index.total)
    reader = ImageItem(SIZE, 0, spatial=spatial)
    size = min(BATCH, count)
    loader = Loader(index, reader, seed=0, rank=0, world=1, global_batch=size, rank_micro_batch=size)
    rows: list[dict[str, float]] = []
    for start in range(0, count, size):
        batch = next(loader)
        told = batch_conditions(batch, first_stage)
        seeds = list(range(start, start + size))
        drawn = sample(parts, [""] * size, steps=steps, seeds=seeds, conditions=told)
        decoded = first_stage.images(first_stage.batch_latents(batch, 0)).clamp(-1, 1)
        for i in range(size):
            wanted = batch["image"][i].float() / 127.5 - 1
            if task == "superres_small":
                rivals = {"bicubic": _enlarged(batch["spatial"][i])}
                inside = torch.ones_like(wanted, dtype=torch.bool)
            else:
                inside = batch["mask"][i].bool().expand_as(wanted)
                known = wanted.flatten(1)[:, ~inside[0].flatten()].mean(1)
                rivals = {"mean_fill": known[:, None, None].expand_as(wanted)}
            found = {"model": drawn[i], "first_stage": decoded[i], **rivals}
            rows.append({name: _squared_error(image, wanted, inside) for name, image in found.items()})
    loader.close()
    # PSNR of the mean squared error over all images, in decibels of the range 2.
    psnr = {name: 10 * math.log10(4 / float(np.mean([row[name] for row in rows]))) for name in rows[0]}
    return {"task": task, "images": len(rows), "sampler_steps": steps, "psnr_db": psnr}


def _squared_error(image: torch.Tensor, wanted: torch.Tensor, inside: torch.Tensor) -> float:
    return float((image - wanted)[inside].square().mean())


def _enlarged(small: torch.Tensor) -> torch.Tensor:
    """[3,h,w] in [-1,1] -> [3,H,W] by Pillow's bicubic filter."""
    pixels = ((small + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    large = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(large)).permute(2, 0, 1).float() / 127.5 - 1


if __name__ == "__main__":
    main()
