"""`make ablation`: LDM-1, 2, 4 and 8 in miniature, with equal compute on the same images (paper, section 4.1).

Unconditional models of sprites at 32 pixels: one of the pixels and three behind autoencoders of factor 2, 4 and 8, which
are trained alike before. With `--minutes` each diffusion model trains as long as the others on this machine (how many
steps that is, is measured once and kept in plan.json); with `--steps` each takes as many steps as the others. Quality is the
Frechet distance of drawn images to the real ones at several checkpoints on the way, against images seen and
against seconds of training. Writes docs/ablation_table.md and docs/ablation.png; docs/ablation.md reads them.

What is done is not done again, and what was stopped goes on: start the same command once more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.curves import Curve, draw_panels
from ldmscale import load, sample
from ldmscale.builders.costs import training_flops
from ldmscale.builders.feature_networks import Features, open_features
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import DiffusionJob
from ldmscale.config.typed import read
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.sources.prepare import prepare
from ldmscale.evaluation.metrics import FeatureSums, frechet_distance, reconstruct
from ldmscale.inference.prompt_score import read_images
from ldmscale.launcher import launch
from ldmscale.models.first_stage import FirstStageNetwork
from ldmscale.tracking.images import tile, write_png

log = logging.getLogger(__name__)

SIZE, BATCH = 32, 64
JUDGE, JUDGE_SIDE, DIRECTIONS = "efficientnet_lite0", 96, 64
DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Model:
    """One row of the paper's figure: as many parameters in each U-Net, as many levels as its latent allows."""

    factor: int
    latent_channels: int
    autoencoder_mult: str
    unet_channels: int
    unet_mult: str
    attention_levels: str

    @property
    def name(self) -> str:
        return f"LDM-{self.factor}"


MODELS = (
    Model(1, 3, "[1]", 48, "[1,1,2,2]", "[2,3]"),
    Model(2, 3, "[1,2]", 48, "[1,2,2]", "[1,2]"),
    Model(4, 4, "[1,1,2]", 64, "[1,2]", "[0,1]"),
    Model(8, 8, "[1,1,2,2]", 64, "[1,2]", "[0,1]"),
)


@dataclass(frozen=True)
class Point:
    """One checkpoint, measured."""

    step: int
    images_seen: int
    seconds: float  # of training steps, without saves and start, at the run's median pace
    distance: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=10.0, help="of training for each diffusion model")
    budget.add_argument("--steps", type=int, help="of each diffusion model, in place of --minutes")
    parser.add_argument("--first-stage-steps", type=int, default=1000)
    parser.add_argument("--points", type=int, default=5, help="checkpoints that are measured, of each model")
    parser.add_argument("--images", type=int, default=256, help="drawn for each point")
    parser.add_argument("--sampler-steps", type=int, default=25)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--root", default=None, help="the sprites' wheel or folder that is here already")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="where table and figure go")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder: Path = given.folder.absolute()
    shards = prepare("sprites", folder / "data", root=given.root, seed=0, heldout_share=0.08)
    for part in (shards.train, shards.heldout):
        ShardIndex.open(list(part), build_missing=True)
    for model in MODELS:
        if status := first_stage(model, folder, given.first_stage_steps, given.ranks):
            return status
    steps = plan(folder, given.minutes, given.steps, given.points, given.ranks)
    for model in MODELS:
        command = training(model, folder, steps[model.name], given.points, given.ranks)
        if status := launch(command, given.ranks):
            return status
    judge = Judge(read_images(shards.train, [], SIZE).pixels)
    rows = [row(model, folder, steps[model.name], judge, given) for model in MODELS]
    given.docs.mkdir(parents=True, exist_ok=True)
    (given.docs / "ablation_table.md").write_text(table(rows, given, len(judge.images)), encoding="utf-8")
    draw_panels(
        given.docs / "ablation.png",
        [
            ("images seen", [Curve(r["name"], [(p.images_seen, p.distance) for p in r["points"]]) for r in rows]),
            ("seconds of training", [Curve(r["name"], [(p.seconds, p.distance) for p in r["points"]]) for r in rows]),
        ],
        "Frechet distance to real images",
    )  # fmt: skip
    log.info("table and figure are in %s", given.docs)
    return 0


def first_stage(model: Model, folder: Path, steps: int, ranks: int) -> int:
    """The autoencoder of a factor and the latents that it makes of the training images; the exit status."""
    if model.factor == 1:
        return 0
    run, latents = folder / f"autoencoder_f{model.factor}", folder / f"latents_f{model.factor}"
    shards = f"data.shards='{folder}/data/train-*.tar'"
    status = launch(
        [
            "autoencoder", "experiment=quickstart", f"run.dir={run}", f"run.name={run.name}", shards,
            f"autoencoder.channel_mult={model.autoencoder_mult}", f"autoencoder.latent_channels={model.latent_channels}",
            f"train.max_steps={steps}", f"train.rank_micro_batch={8 // ranks}", f"loss.gan_start_step={steps * 3 // 4}",
            "preview.every_steps=0", f"checkpoint.save_every_steps={max(1, steps // 2)}", "tracking.wandb=off",
        ],
        ranks,
    )  # fmt: skip
    return status or launch(
        [
            "latents", "data=shards", shards, f"data.image_size={SIZE}", "data.workers=0", f"first_stage.path={run}",
            f"latents.path={latents}",
        ],
        1,
    )  # fmt: skip


def training(model: Model, folder: Path, steps: int, points: int, ranks: int, name: str = "") -> list[str]:
    """The command of a diffusion model; a constant learning rate, so that each checkpoint stands for a run of its length."""
    run = folder / (name or f"ldm_{model.factor}")
    if model.factor == 1:
        source = [
            "data=shards",
            f"data.image_size={SIZE}",
            f"data.shards='{folder}/data/train-*.tar'",
            "autoencoder=pixels",
        ]
    else:
        source = [
            f"data.shards='{folder}/latents_f{model.factor}/*.tar'", f"first_stage.path={folder}/autoencoder_f{model.factor}",
            f"autoencoder.channel_mult={model.autoencoder_mult}", f"autoencoder.latent_channels={model.latent_channels}",
        ]  # fmt: skip
    every = max(1, steps // points)
    return [
        "diffusion", "experiment=unconditional_small", *source, f"run.dir={run}", f"run.name={run.name}",
        f"unet.in_channels={model.latent_channels}", f"unet.out_channels={model.latent_channels}",
        f"unet.channels={model.unet_channels}", f"unet.channel_mult={model.unet_mult}",
        f"unet.attention_levels={model.attention_levels}", "data.workers=0", "optim.curve=constant", f"train.max_steps={steps}",
        f"train.global_batch={BATCH}", f"train.rank_micro_batch={BATCH // ranks}", f"train.log_every_steps={max(1, every // 4)}",
        "preview.every_steps=0", f"checkpoint.save_every_steps={every}", f"checkpoint.keep_every_steps={every}",
        "tracking.wandb=off",
    ]  # fmt: skip


def plan(folder: Path, minutes: float, steps: int | None, points: int, ranks: int) -> dict[str, int]:
    """Steps of each model, multiples of `points`; of a budget in minutes by a short run of each, made once."""
    if steps is not None:
        return {model.name: max(1, steps // points) * points for model in MODELS}
    file = folder / "plan.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if known.get("minutes") != minutes or known.get("points") != points:
        chosen = {}
        for model in MODELS:
            name = f"probe_{model.factor}"
            if status := launch(training(model, folder, 12, 2, ranks, name), ranks):
                raise SystemExit(status)
            pace = statistics.median(step_seconds(folder / name).values())
            chosen[model.name] = max(1, int(minutes * 60 / pace / points)) * points
        known = {"minutes": minutes, "points": points, "steps": chosen}
        file.write_text(json.dumps(known, indent=1) + "\n")
    planned: dict[str, int] = known["steps"]
    return planned


def step_seconds(run: Path) -> dict[int, float]:
    """Mean seconds of a step up to each logged step since the one before."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["time/step_seconds"] for line in lines if "time/step_seconds" in line}


def seconds_until(run: Path, step: int) -> float:
    """By the median of what steps took, so that it does not count when the machine was busy with something else."""
    return step * statistics.median(step_seconds(run).values())


class Judge:
    """Frechet distances to the real images, in the directions of a network's features in which these vary most.

    The features are many more than the images: a distance over all would measure the number of images.
    """

    def __init__(self, images: Tensor) -> None:
        opened = open_features(JUDGE, None, None, torch.device("cpu"), key="judge")
        assert opened is not None
        features = replace(opened, side=JUDGE_SIDE)
        self.images, self._features = images, features
        found = described(features, images).double()
        _, _, rows = torch.linalg.svd(found - found.mean(0), full_matrices=False)
        self._directions = rows[:DIRECTIONS].T  # [width, DIRECTIONS]
        self._real = self._gaussian(found)

    def distance(self, images: Tensor) -> float:
        """Of [N,3,H,W] in [-1,1], about as many as there are directions or more."""
        return frechet_distance(self._gaussian(described(self._features, images).double()), self._real)

    def _gaussian(self, found: Tensor) -> tuple[Tensor, Tensor]:
        sums = FeatureSums(self._directions.shape[1], torch.device("cpu"))
        sums.add(found @ self._directions)
        return sums.gaussian()


def described(features: Features, images: Tensor) -> Tensor:
    """Features [N, width] of images [N,3,H,W]."""
    return torch.cat([features(part) for part in torch.split(images, 32)])


def row(model: Model, folder: Path, steps: int, judge: Judge, given: argparse.Namespace) -> dict[str, Any]:
    """What the table and the figure tell of a model; points that were measured before are read."""
    run = folder / f"ldm_{model.factor}"
    config = read(DiffusionJob, RunFolder(run).config())
    file = folder / f"points_ldm_{model.factor}_{given.images}x{given.sampler_steps}.json"
    points = [Point(**known) for known in json.loads(file.read_text())] if file.exists() else []
    for step in range(steps // given.points, steps + 1, steps // given.points):
        if step in [point.step for point in points]:
            continue
        images = drawn(run / "checkpoints" / f"step_{step:08d}", given.images, given.sampler_steps)
        found = Point(step, step * BATCH, seconds_until(run, step), judge.distance(images))
        log.info("%s: %s", model.name, found)
        points.append(found)
        file.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
        shown = ((images[:32] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        write_png(folder / f"ldm_{model.factor}_{step:08d}.png", tile(shown, 8), [])
    parts = load(run)
    assert parts.unet is not None and parts.autoencoder is not None and parts.latent_shape is not None
    return {
        "name": model.name,
        "latent": "x".join(str(size) for size in parts.latent_shape),
        "parameters": sum(weight.numel() for weight in parts.unet.parameters()),
        "flops": training_flops(config, parts.latent_shape),
        "points": [point for point in points if point.step <= steps],
        "bound": bound(parts.autoencoder, judge),
    }


def bound(autoencoder: FirstStageNetwork, judge: Judge) -> float:
    """The distance of the reconstructed real images: what a perfect model of the latents would reach."""
    return judge.distance(reconstruct(autoencoder, judge.images))


def drawn(checkpoint: Path, count: int, steps: int) -> Tensor:
    """`count` images of the averaged weights, of the seeds 0, 1 ...: the same noise for every checkpoint of a model."""
    parts = load(checkpoint)
    return torch.cat(
        [
            sample(parts, [""] * len(seeds), steps=steps, guidance=1.0, seeds=seeds)
            for seeds in (range(start, min(start + 64, count)) for start in range(0, count, 64))
        ]
    )


def table(rows: Sequence[dict[str, Any]], given: argparse.Namespace, real: int) -> str:
    budget = f"--steps {given.steps}" if given.steps else f"--minutes {given.minutes:g}"
    lines = [
        "# LDM-1, 2, 4 and 8 at equal compute",
        "",
        f'Made by `make ablation ARGS="{budget} --ranks {given.ranks} --first-stage-steps {given.first_stage_steps} '
        f'--images {given.images} --sampler-steps {given.sampler_steps}"`: '
        f"unconditional models of {real} sprites at {SIZE} px, batches of {BATCH}. The distance is Frechet's over the {DIRECTIONS} "
        f"directions in which the real images' {JUDGE} features (at {JUDGE_SIDE} px) vary most, of {given.images} images drawn by "
        f"{given.sampler_steps} DDIM steps: no FID. [ablation.md](ablation.md) reads it.",
        "",
        "| model | latent | parameters | GFLOP an image | images a second | images seen | seconds | distance | reconstructions |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for found in rows:
        last: Point = found["points"][-1]
        lines.append(
            f"| {found['name']} | {found['latent']} | {found['parameters'] / 1e6:.2f} M | {found['flops'] / 1e9:.2f} "
            f"| {last.images_seen / last.seconds:.0f} | {last.images_seen} | {last.seconds:.0f} | {last.distance:.1f} "
            f"| {max(0.0, found['bound']):.1f} |"
        )
    lines += [
        "",
        "Distance after each fifth of the way:" if given.points == 5 else "Distance on the way:",
        "",
    ]
    lines += ["| model | " + " | ".join(f"{i + 1}/{given.points}" for i in range(given.points)) + " |"]
    lines += ["|---|" + "---:|" * given.points]
    for found in rows:
        lines.append(
            f"| {found['name']} | " + " | ".join(f"{p.distance:.1f}" for p in found["points"]) + " |"
        )
    return "\n".join([*lines, "", "![distance against images seen and against seconds](ablation.png)"]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
