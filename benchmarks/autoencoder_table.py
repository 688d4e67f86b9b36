"""`make autoencoder-table`: KL-f4 and VQ-f4 at 64 px with and without the GAN term, measured on held-out sprites.

Four runs of the same length on the quickstart's images, each evaluated by `ldmscale evaluate`; the table goes to
docs/autoencoder_table.md. Runs that are done are not done again; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.sources.prepare import prepare
from ldmscale.launcher import launch

log = logging.getLogger(__name__)

SIZE, BATCH, LATE = 64, 8, 0.5  # pixels; images a step; share of the steps before the discriminator joins
TABLE = Path(__file__).parents[1] / "docs" / "autoencoder_table.md"
JUDGE = "efficientnet_lite0"


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    gan: bool
    settings: tuple[str, ...]


KL = ("autoencoder=quickstart_kl",)
VQ = (
    "autoencoder=quickstart_vq",
    "codebook.start=kmeans",
    "codebook.revive_after_steps=50",
    "codebook.usage_window_steps=50",
)
ROWS = (
    Row("kl", "KL-f4", False, KL),
    Row("kl_gan", "KL-f4", True, KL),
    Row("vq", "VQ-f4", False, VQ),
    Row("vq_gan", "VQ-f4", True, VQ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=320, help="of each of the four runs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--root", default=None, help="the sprites' wheel or folder that is here already")
    parser.add_argument("--folder", type=Path, default=Path("runs/autoencoder_table"))
    parser.add_argument("--table", type=Path, default=TABLE)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = given.folder / f"{given.steps}_steps"
    shards = prepare("sprites", given.folder / "data", root=given.root, seed=0, heldout_share=0.08)
    for part in (shards.train, shards.heldout):
        ShardIndex.open(list(part), build_missing=True)
    results = []
    for row in ROWS:
        began = time.perf_counter()
        run = folder / row.name
        if status := launch(training(row, run, given.folder / "data", given.steps, given.ranks), given.ranks):
            return status
        seconds = time.perf_counter() - began
        if status := launch(evaluation(run, given.folder / "data"), 1):
            return status
        results.append(
            (row, json.loads((run / "evaluation" / "reconstruction.json").read_text()), last_metrics(run))
        )
        log.info("%s: %.0f s", row.name, seconds)
    given.table.parent.mkdir(parents=True, exist_ok=True)
    given.table.write_text(table(results, given.steps, given.ranks), encoding="utf-8")
    log.info("the table is in %s", given.table)
    return 0


def training(row: Row, run: Path, data: Path, steps: int, ranks: int) -> list[str]:
    start = int(steps * LATE) if row.gan else steps
    return [
        "autoencoder", "experiment=quickstart", f"run.dir={run}", f"run.name={row.name}", f"data.image_size={SIZE}",
        f"data.shards={data}/train-*.tar", f"data.heldout_shards={data}/heldout-*.tar", "data.flip=true",
        f"train.max_steps={steps}", f"train.global_batch={BATCH}", f"train.rank_micro_batch={BATCH // ranks}",
        f"loss.gan_start_step={start}", "loss.perceptual_min_side=64", "preview.every_steps=0",
        f"validation.every_steps={max(1, steps // 4)}", "validation.images=64", "scale_samples=256",
        f"checkpoint.save_every_steps={max(1, steps // 2)}", "tracking.wandb=off", *row.settings,
    ]  # fmt: skip


def evaluation(run: Path, data: Path) -> list[str]:
    return [
        "evaluate", f"evaluate.model={run}", f"data.shards={data}/heldout-*.tar", f"data.image_size={SIZE}",
        f"evaluate.perceptual={JUDGE}", f"evaluate.features={JUDGE}", "evaluate.rank_batch=8",
    ]  # fmt: skip


def last_metrics(run: Path) -> dict[str, Any]:
    """The last logged value of every metric."""
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    return found


def table(results: list[tuple[Row, dict[str, Any], dict[str, Any]]], steps: int, ranks: int) -> str:
    protocol = results[0][1]["protocol"]
    lines = [
        "# KL-f4 and VQ-f4 with and without the GAN term",
        "",
        f"Made by `make autoencoder-table` (`--steps {steps} --ranks {ranks}`): {steps} steps of {BATCH} sprites at {SIZE} px,",
        f"measured on {protocol['images']} held-out ones by `ldmscale evaluate`. The networks are the quickstart's (not the",
        f"published sizes), the discriminator joins after {LATE:.0%} of the steps. The perceptual distance and the features",
        f"of the Frechet distance are those of {JUDGE}: neither LPIPS nor FID, and the former was also trained on. There are",
        "fewer images than features, so the Frechet distances compare these rows with each other only.",
        "",
        "| model | GAN | PSNR, dB | SSIM | perceptual distance | Frechet distance | codebook used |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row, result, metrics in results:
        found = result["metrics"]
        usage = metrics.get("codebook/usage")
        lines.append(
            f"| {row.title} | {'yes' if row.gan else 'no'} | {found['psnr_db']:.2f} | {found['ssim']:.3f} "
            f"| {found['perceptual']['distance']:.4f} | {found[f'frechet_distance_{JUDGE}']:.1f} "
            f"| {'' if usage is None else f'{usage:.0%}'} |"
        )
    lines += ["", "What each figure is, and what a GAN term does to it: [autoencoder.md](autoencoder.md)."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
