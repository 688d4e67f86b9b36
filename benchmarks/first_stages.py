"""`python -m benchmarks.first_stages [NAME ...]`: does every published first stage train, at its full width, by its own job?

Three steps of small made-up images on two CPU ranks under ZeRO-3, the discriminator from the first step on, the latent
scale and a checkpoint at the end. One row each: parameters as loaded from that checkpoint, what the steps gave, and what
they cost. Without the perceptual network, whose weights are not here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmscale import load
from ldmscale.launcher import launch

# Parameters as counted in the released code.
PUBLISHED = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f4_noattn": 53_219_486,
    "vq_f8": 67_717_295,
    "vq_f8_n256": 67_652_783,
    "vq_f16": 69_593_371,
}
STEPS = 3


@dataclass(frozen=True)
class Trained:
    """What was found of one experiment."""

    name: str
    parameters: int
    losses: tuple[float, ...]  # of the autoencoder at each step
    gan: tuple[float, ...]  # of the discriminator
    factor: float  # that brings its latents to unit variance
    step_seconds: float  # of the last step
    seconds: float  # of the whole job


def train(name: str, folder: Path, size: int, ranks: int) -> Trained:
    """Run experiment autoencoder_<name>. Raises RuntimeError where the job fails or its figures are not finite."""
    run = folder / name
    began = time.perf_counter()
    status = launch(
        [
            "autoencoder", f"experiment=autoencoder_{name}", f"run.dir={run}", "data=synthetic", f"data.image_size={size}",
            "loss.perceptual=none", "loss.perceptual_weights=null", "loss.perceptual_heads=null", "loss.gan_start_step=0",
            f"train.max_steps={STEPS}", f"train.global_batch={ranks}", "train.rank_micro_batch=1", "train.log_every_steps=1",
            "train.precision=fp32", f"scale_samples={ranks}", "preview.every_steps=0", "checkpoint.save_every_steps=0",
            "tracking.wandb=off",
        ],
        ranks,
        cpu=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"autoencoder_{name} ended with status {status}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/total" in line]
    parts = load(run)
    assert parts.autoencoder is not None and parts.latent_statistics is not None
    found = Trained(
        name,
        sum(p.numel() for p in parts.autoencoder.parameters()),
        tuple(line["loss/total"] for line in steps),
        tuple(line["gan/discriminator"] for line in steps),
        parts.latent_statistics["factor"],
        steps[-1]["time/step_seconds"],
        seconds,
    )
    figures = [*found.losses, *found.gan, found.factor]
    if len(steps) != STEPS or not all(map(math.isfinite, figures)):
        raise RuntimeError(f"autoencoder_{name}: {found}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(PUBLISHED)}; all unless given"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs there")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in PUBLISHED]:
        parser.error(f"no first stage {', '.join(unknown)}; there are: {', '.join(PUBLISHED)}")
    said = sys.stdout.write
    said(
        "| first stage | parameters | as published | losses | of D | latent factor | s a step | s in all |\n"
    )
    said("|---|---:|---|---|---|---:|---:|---:|\n")
    wrong = 0
    for name in given.names or PUBLISHED:
        folder = given.folder or Path(tempfile.mkdtemp(prefix="first_stages_"))
        try:
            found = train(name, folder, given.size, given.ranks)
        finally:
            if given.folder is None:  # a checkpoint of a gigabyte
                shutil.rmtree(folder, ignore_errors=True)
        equal = found.parameters == PUBLISHED[name]
        wrong += not equal
        losses, judged = (
            ", ".join(f"{value:.4g}" for value in values) for values in (found.losses, found.gan)
        )
        said(
            f"| {name} | {found.parameters:,} | {'yes' if equal else f'{PUBLISHED[name]:,}'} | {losses} | {judged} "
            f"| {found.factor:.3g} | {found.step_seconds:.1f} | {found.seconds:.0f} |\n"
        )
        sys.stdout.flush()
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
