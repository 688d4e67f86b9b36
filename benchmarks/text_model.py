"""`make text-model`: a small model that follows text, trained in at most 45 minutes of processor time, and its figures.

    make text-model                              trains, measures, writes docs/text_model.md and docs/text_model.png
    make text-model ARGS="--root arcade.whl"     with the sprites' wheel that is here already

The quickstart with longer stages and a constant learning rate, as the published models have it, so that the averaged
weights do what a falling rate does elsewhere. An interrupted training goes on, a finished one is only measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmscale.evaluation.metrics import PromptFollowing, prompt_following, reconstruct
from ldmscale.inference.load import load
from ldmscale.inference.prompt_score import RealImages, draw, read_images
from ldmscale.jobs import quickstart
from ldmscale.tracking.images import captioned, to_uint8, write_png

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
SIZE, NEAREST = 32, 5  # pixels; real images among which the own one counts as found
SAMPLER_STEPS, GUIDANCE, WEAK, STRONG = 30, 3.0, 1.0, 4.0
SEEDS = 4  # samples of each caption, for how much they differ
BUDGET_MINUTES = 45.0  # of processor time, all ranks together
# Nothing has to be sharded at this size: ZeRO-0 spends its processor time on more steps.
AUTOENCODER = ("zero=0", "train.global_batch=16", "train.rank_micro_batch=8", "optim.lr=1.0e-3")
DIFFUSION = ("zero=0", "optim.curve=constant", "ema.decay=0.998")


@dataclass(frozen=True)
class Measured:
    """What was drawn and found, for the document."""

    raw: dict[str, PromptFollowing]  # "seen" and "heldout" captions, by the raw weights
    by_guidance: dict[float, PromptFollowing]  # a part of the seen captions, each with several seeds
    spread: dict[float, float]  # of the samples of one caption, at each guidance
    real_spread: float  # of real images of different captions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=None, help="the sprites' wheel or folder that is here already")
    parser.add_argument("--folder", type=Path, default=Path("runs/text_model"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--autoencoder-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=1500, help="of the diffusion model, 64 images each")
    parser.add_argument("--captions", type=int, default=48, help="drawn at guidance 1 and 4")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "text_model.md")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = overrides(given.folder, given.root, given.ranks, given.autoencoder_steps, given.steps)
    if status := quickstart.main(settings):
        return status
    summary = json.loads((given.folder / "summary.json").read_text())
    real = read_images(
        sorted(map(str, (given.folder / "data").glob("train-*.tar"))),
        sorted(map(str, (given.folder / "data").glob("heldout-*.tar"))),
        SIZE,
    )
    picture = given.document.with_suffix(".png")
    measured = measure(given.folder, real, given.captions, picture)
    text = document(summary, measured, validation_losses(given.folder), settings, picture.name)
    given.document.write_text(text, encoding="utf-8")
    log.info("figures: %s, picture: %s (%d bytes)", given.document, picture, picture.stat().st_size)
    return 0


def overrides(folder: Path, root: str | None, ranks: int, autoencoder_steps: int, steps: int) -> list[str]:
    """The quickstart's command line."""
    first = [
        *AUTOENCODER,
        f"train.max_steps={autoencoder_steps}",
        f"loss.gan_start_step={autoencoder_steps * 3 // 4}",
    ]
    second = [
        *DIFFUSION,
        f"train.max_steps={steps}",
        f"validation.every_steps={max(1, steps // 10)}",
        f"preview.every_steps={max(1, steps // 4)}",
        f"checkpoint.save_every_steps={max(1, steps // 4)}",
    ]
    return [
        f"run.dir={folder}", f"run.name={folder.name}", f"ranks={ranks}", *([f"data.root={root}"] if root else []),
        f"score.sampler_steps={SAMPLER_STEPS}", f"score.guidance={GUIDANCE}", f"score.nearest={NEAREST}",
        f"overrides.autoencoder={json.dumps(first)}", f"overrides.diffusion={json.dumps(second)}",
    ]  # fmt: skip


@torch.no_grad()
def measure(run: Path, real: RealImages, captions: int, picture: Path) -> Measured:
    """Draw by raw weights, and at two guidance scales, and score; writes the picture."""
    averaged, raw = load(run), load(run, ema=False)
    autoencoder = averaged.autoencoder
    assert autoencoder is not None
    compared = reconstruct(autoencoder, real.pixels)

    def follows(samples: Tensor, own: list[int]) -> PromptFollowing:
        return prompt_following(samples, own, compared, real.classes, NEAREST)

    groups = {
        "seen": list(range(real.trained)),
        "heldout": list(range(real.trained, len(real.captions))),
    }
    by_raw = {}
    for name, own in groups.items():  # with the seeds of the quickstart's scores
        drawn = draw(raw, [real.captions[at] for at in own], own, SAMPLER_STEPS, GUIDANCE)
        by_raw[name] = follows(drawn, own)
    chosen = _evenly(real.trained, captions)
    own = [at for at in chosen for _ in range(SEEDS)]
    seeds = [1_000_000 + number for number in range(len(own))]
    by_guidance, spread = {}, {}
    for guidance in (WEAK, STRONG):
        drawn = draw(averaged, [real.captions[at] for at in own], seeds, SAMPLER_STEPS, guidance)
        by_guidance[guidance] = follows(drawn, own)
        spread[guidance] = float(np.mean([distance(group) for group in torch.split(drawn, SEEDS)]))
    shown = [*_of(groups["seen"], 6), *_of(groups["heldout"], 4)]
    columns = []
    for parts, guidance, offset in (
        (averaged, WEAK, 0),
        (averaged, WEAK, 1),
        (averaged, STRONG, 0),
        (averaged, STRONG, 1),
        (raw, STRONG, 0),
    ):
        numbers = [2_000_000 + 2 * at + offset for at in shown]
        columns.append(
            to_uint8(draw(parts, [real.captions[at] for at in shown], numbers, SAMPLER_STEPS, guidance))
        )
    columns.append(to_uint8(real.pixels[shown]))
    titles = [real.captions[at] + ("" if at < real.trained else "  (held out)") for at in shown]
    rows = [(title, [column[row] for column in columns]) for row, title in enumerate(titles)]
    header = ("guidance 1", "", "guidance 4", "", "4, raw", "its own")
    write_png(picture, captioned(rows, header, cell=64), titles)
    return Measured(by_raw, by_guidance, spread, distance(real.pixels[_evenly(real.trained, 64)]))


def distance(images: Tensor) -> float:
    """Mean over all pairs of the root of the mean squared difference, as a share of the range; images [N,3,H,W] in [-1,1]."""
    flat = images.clamp(-1, 1).flatten(1).double()
    return float(torch.pdist(flat).mean()) / math.sqrt(flat.shape[1]) / 2


def validation_losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, and the held-out loss by raw and by averaged weights."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line["validation/raw/loss"], line["validation/ema/loss"])
        for line in lines
        if "validation/raw/loss" in line
    ]


def document(
    summary: dict[str, Any],
    measured: Measured,
    losses: list[tuple[int, float, float]],
    settings: list[str],
    picture: str,
) -> str:
    """The text of docs/text_model.md."""
    cpu, wall = summary["cpu_seconds"], summary["seconds"]
    stages = ("autoencoder", "latents", "diffusion")
    total = sum(cpu[name] for name in stages) / 60
    within = "within" if total <= BUDGET_MINUTES else "NOT within"
    spent = "; ".join(f"{name} {cpu[name] / 60:.1f} ({wall[name] / 60:.1f})" for name in stages)
    averaged, weak, strong = (
        summary["prompt_following"],
        measured.by_guidance[WEAK],
        measured.by_guidance[STRONG],
    )
    lines = [
        "# A model that follows text",
        "",
        "Written by `make text-model`: the [quickstart](quickstart.md) with longer stages (`benchmarks/text_model.py`), on",
        f"{summary['ranks']} ranks. One training with one seed: the intervals (95 %) are of the drawing alone, and another",
        "training varies more than that.",
        "",
        f"Processor time of the training, all ranks together: {total:.1f} minutes, {within} the {BUDGET_MINUTES:.0f} that it may",
        f"take. Of the stages, in brackets the wall time: {spent} minutes.",
        f"Reconstruction of held-out images: PSNR {summary['reconstruction']['psnr_db']:.1f} dB.",
        "",
        f"## Prompts are followed (guidance {GUIDANCE:g}, DDIM, {SAMPLER_STEPS} steps)",
        "",
        "| weights | captions | samples | class (chance) | own image among the 5 nearest (chance) | own image the nearest |",
        "|---|---|---:|---:|---:|---:|",
    ]
    titles = {"seen": "trained on", "heldout": "held out"}
    for name, title in titles.items():
        lines.append(_scores("averaged", title, averaged[name]))
    for name, title in titles.items():
        lines.append(_scores("raw", title, vars(measured.raw[name])))
    lines += [
        "",
        "What the scores are: [quickstart.md](quickstart.md#what-is-measured). Raw and averaged weights drew with the same seeds.",
        "",
        "## Averaged weights against raw ones: the loss on held-out images",
        "",
        "Fixed noise and timesteps, mean squared error of the velocity.",
        "",
        "| step | " + " | ".join(str(step) for step, _, _ in losses) + " |",
        "|---|" + "---:|" * len(losses),
        "| raw | " + " | ".join(f"{raw:.4f}" for _, raw, _ in losses) + " |",
        "| averaged | " + " | ".join(f"{ema:.4f}" for _, _, ema in losses) + " |",
        "",
        "## What guidance trades",
        "",
        f"{weak.samples // SEEDS} captions that were trained on, {SEEDS} seeds each, averaged weights. *Spread*: how far apart two",
        "samples of one caption are (root mean square of pixels, as a share of the range); two real images are",
        f"{measured.real_spread:.3f} apart.",
        "",
        "| guidance | class | own image among the 5 nearest | own image the nearest | spread |",
        "|---:|---:|---:|---:|---:|",
    ]
    for guidance, found in ((WEAK, weak), (STRONG, strong)):
        lines.append(
            f"| {guidance:g} | {_share(found.class_share, found.samples)} | {_share(found.own_share, found.samples)} "
            f"| {_share(found.first_share, found.samples)} | {measured.spread[guidance]:.3f} |"
        )
    lines += ["", f"![samples]({picture})", "", "## Settings", "", "    ldmscale quickstart \\"]
    shown = [one for one in settings if not one.startswith(("data.root=", "run."))]
    lines += [
        f"      '{one}'" + (" \\" if number + 1 < len(shown) else "") for number, one in enumerate(shown)
    ]
    return "\n".join(lines) + "\n"


def _scores(weights: str, captions: str, found: dict[str, Any]) -> str:
    count = found["samples"]
    return (
        f"| {weights} | {captions} | {count} | {_share(found['class_share'], count)} ({found['class_chance']:.2f}) "
        f"| {_share(found['own_share'], count)} ({found['own_chance']:.3f}) | {_share(found['first_share'], count)} |"
    )


def _share(share: float, count: int) -> str:
    """A share with half the width of its interval (Agresti and Coull 1998)."""
    n = count + 3.84
    p = (share * count + 1.92) / n
    return f"{share:.3f} ± {1.96 * math.sqrt(p * (1 - p) / n):.3f}"


def _evenly(count: int, wanted: int) -> list[int]:
    wanted = min(wanted, count)
    return [count * number // wanted for number in range(wanted)]


def _of(numbers: list[int], wanted: int) -> list[int]:
    return [numbers[at] for at in _evenly(len(numbers), wanted)]


if __name__ == "__main__":
    raise SystemExit(main())
