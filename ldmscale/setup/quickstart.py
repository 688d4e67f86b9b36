"""The quickstart: the whole pipeline, small: real images, shards, autoencoder, latents, diffusion, samples, scores.

Each stage is the job that a user would start, on the same launcher; a quickstart that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

from ldmscale import redact
from ldmscale.config import QuickstartJob
from ldmscale.config.typed import differences, plain
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.sources.prepare import prepare
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.preemption import EXIT_STOPPED
from ldmscale.errors import ConfigError
from ldmscale.launcher import count_gpus, launch
from ldmscale.tracking.logs import set_up_logging

log = logging.getLogger(__name__)

CPU_RANKS = 2  # enough to shard for real


def run_quickstart(config: QuickstartJob) -> int:
    """Run the pipeline, or what an interrupted start left of it, and return the exit status."""
    folder = Path(config.run.dir)
    set_up_logging(None, Ranks())
    _settle(config, folder)
    if (folder / "summary.json").exists():
        log.info("%s has finished; remove the folder, or give another run.name, to do it again", folder)
        _tell(json.loads((folder / "summary.json").read_text()), folder)
        return 0
    return _run(config, folder)


def _run(config: QuickstartJob, folder: Path) -> int:
    began = time.perf_counter()
    source = config.data
    prepared = prepare(
        source.source, folder / "data", root=source.root, seed=config.seed, heldout_share=source.heldout_share
    )
    for shards in (prepared.train, prepared.heldout):
        ShardIndex.open(list(shards), build_missing=True)
    log.info(
        "1/5 shards: %d images to train on, %d held out, in %s",
        prepared.train_samples,
        prepared.heldout_samples,
        folder / "data",
    )
    ranks = _ranks(config.ranks or count_gpus() or CPU_RANKS)
    where = {name: folder / name for name in ("autoencoder", "latents")}
    pixels = _settings({"data.image_size": source.image_size, "seed": config.seed})
    train = _settings({"data.shards": folder / "data" / "train-*.tar"})
    heldout = _settings({"data.heldout_shards": folder / "data" / "heldout-*.tar"})
    stages = [
        (
            "2/5 autoencoder",
            ["autoencoder", "experiment=quickstart", *pixels, *train, *heldout,
             *_settings({"run.dir": where["autoencoder"], "train.rank_micro_batch": 8 // max(2, ranks)}),
             *config.overrides.autoencoder],
        ),
        (
            "3/5 latents",
            ["latents", pixels[0], *train,
             *_settings({"first_stage.path": where["autoencoder"], "latents.path": where["latents"]})],
        ),
        (
            "4/5 diffusion",
            ["diffusion", "experiment=quickstart", pixels[1], *heldout,
             *_settings({"run.name": config.run.name, "run.dir": folder, "data.shards": where["latents"] / "*.tar",
                         "first_stage.path": where["autoencoder"], "train.rank_micro_batch": 64 // max(2, ranks)}),
             *config.overrides.diffusion],
        ),
    ]  # fmt: skip
    seconds: dict[str, float] = {}
    spent_file = folder / "cpu_seconds.json"  # of interrupted starts, too
    cpu_seconds: dict[str, float] = json.loads(spent_file.read_text()) if spent_file.exists() else {}
    for title, arguments in stages:
        log.info("%s on %d ranks", title, ranks)
        start, spent = time.perf_counter(), _cpu_seconds()
        status = launch(arguments, ranks)
        cpu_seconds[arguments[0]] = cpu_seconds.get(arguments[0], 0.0) + _cpu_seconds() - spent
        spent_file.write_text(json.dumps(cpu_seconds) + "\n")
        if status:
            how = logging.INFO if status == EXIT_STOPPED else logging.ERROR
            log.log(how, "%s ended with status %d", title, status)
            return status
        seconds[arguments[0]] = time.perf_counter() - start
    log.info("5/5 samples and scores")
    start, spent = time.perf_counter(), _cpu_seconds()
    from ldmscale.inference.prompt_score import (
        score,  # imports torch, which the stages before do not need here
    )

    summary = score(
        folder, where["autoencoder"], [*prepared.train], [*prepared.heldout], source.image_size, config.score
    )
    seconds["scores"] = time.perf_counter() - start
    cpu_seconds["scores"] = _cpu_seconds() - spent
    summary |= {
        "seconds": {**seconds, "total": time.perf_counter() - began},
        "cpu_seconds": cpu_seconds,  # of all ranks and threads
        "ranks": ranks,
        "source": source.source,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _tell(summary, folder)
    return 0


def _cpu_seconds() -> float:
    """Processor time of this process and of all that it has waited for, over all threads."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in spent)


def _settle(config: QuickstartJob, folder: Path) -> None:
    """Write down what this folder's quickstart is; refuse another one in it."""
    file, now = folder / "quickstart.json", redact.config(plain(config))
    if file.exists():
        changed = differences(json.loads(file.read_text()), now)
        if faults := [
            f"{key}={new!r}, but {folder} was started with {old!r}: give another run.name to start a new one"
            for key, (old, new) in changed.items()
            if not key.startswith("run.")
        ]:
            raise ConfigError(faults)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n")


def _ranks(wanted: int) -> int:
    """As many ranks as are wanted and divide the stages' batches (of 8 and of 64 samples)."""
    fitting = max(ranks for ranks in (1, 2, 4, 8) if ranks <= max(1, wanted))
    if fitting != wanted:
        log.info("the quickstart's small batches run on %d of %d ranks", fitting, wanted)
    return fitting


def _settings(values: dict[str, object]) -> list[str]:
    """Overrides with values quoted for Hydra's grammar, whatever a path contains."""

    def quoted(value: object) -> str:
        if isinstance(value, int):
            return str(value)
        text = str(value).replace("\\", "\\\\").replace("'", "\\'")
        return f"'{text}'"

    return [f"{key}={quoted(value)}" for key, value in values.items()]


def _tell(summary: dict[str, Any], folder: Path) -> None:
    """The figures as measured, with what chance would reach, where things lie, and what to try next."""
    lines = [
        "",
        f"reconstruction of held-out images   PSNR {summary['reconstruction']['psnr_db']:.1f} dB",
        f"{'prompt following':<34}{'class':>9}{'chance':>9}{'own image':>12}{'chance':>9}   samples",
    ]
    for name, title in (("seen", "captions that were trained on"), ("heldout", "captions held out")):
        found = summary["prompt_following"][name]
        lines.append(
            f"  {title:<32}{found['class_share']:>9.2f}{found['class_chance']:>9.2f}{found['own_share']:>12.2f}"
            f"{found['own_chance']:>9.3f}   {found['samples']}"
        )
    following = summary["prompt_following"]["seen"]
    example = summary["example_prompt"].replace("'", " ").replace('"', " ")
    lines += [
        f"  class: the nearest real image is of the prompt's class; own image: among the {following['nearest']} nearest.",
        "  These are the figures of a toy: a few hundred images of 32 pixels, a few minutes of training.",
        "",
        f"prompts beside nearest real images  {folder / 'samples' / 'prompts.png'}",
        f"the run, metrics and checkpoints    {folder}   (autoencoder in {folder / 'autoencoder'})",
        f"time                                {summary['seconds']['total'] / 60:.1f} minutes on {summary['ranks']} ranks",
        "",
        f"try next:  ldmscale sample sample.model={folder} 'sample.prompts=[\"{example}\"]' sample.guidance=3",
    ]
    for line in lines:
        log.info("%s", line)
