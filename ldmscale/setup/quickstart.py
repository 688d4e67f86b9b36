"""The quickstart: the whole pipeline, small: real images, shards, autoencoder, latents, diffusion, samples, scores.

Each stage is the job that a user would start, on the same launcher; a quickstart that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmscale import redact
from ldmscale.config import QuickstartJob
from ldmscale.config.overrides import setting
from ldmscale.config.typed import differences, plain
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.sources.prepare import prepare
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.preemption import EXIT_STOPPED
from ldmscale.errors import ConfigError
from ldmscale.launcher import count_gpus, launch
from ldmscale.storage.atomic import write_json
from ldmscale.storage.given_files import read_given_object
from ldmscale.tracking.logs import set_up_logging

log = logging.getLogger(__name__)

_REMEDY = "remove the folder, or give another run.name"
_SECONDS, _CPU_SECONDS = "seconds.json", "cpu_seconds.json"  # of each part, over all starts
CPU_RANKS = 2  # enough to shard for real


def run_quickstart(config: QuickstartJob) -> int:
    """Run the pipeline, or what an interrupted start left of it, and return the exit status."""
    folder = Path(config.run.dir)
    set_up_logging(None, Ranks())
    _settle(config, folder)
    if (folder / "summary.json").exists():
        log.info("%s has finished; remove the folder, or give another run.name, to do it again", folder)
        _tell(read_given_object(folder / "summary.json", _REMEDY), folder)
        return 0
    return _run(config, folder)


def _run(config: QuickstartJob, folder: Path) -> int:
    source = config.data
    with _timed(folder, "shards"):
        prepared = prepare(
            source.source,
            folder / "data",
            root=source.root,
            seed=config.seed,
            heldout_share=source.heldout_share,
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
    for title, arguments in stages:
        log.info("%s on %d ranks", title, ranks)
        with _timed(folder, arguments[0]):
            status = launch(arguments, ranks, deliver=True)
        if status:
            how = logging.INFO if status == EXIT_STOPPED else logging.ERROR
            log.log(how, "%s ended with status %d", title, status)
            return status
    log.info("5/5 samples and scores")
    from ldmscale.inference.prompt_score import (
        score,  # imports torch, which the stages before do not need here
    )

    with _timed(folder, "scores"):
        summary = score(
            folder,
            where["autoencoder"],
            [*prepared.train],
            [*prepared.heldout],
            source.image_size,
            config.score,
        )
    seconds = _read(folder / _SECONDS)
    summary |= {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "cpu_seconds": _read(folder / _CPU_SECONDS),  # of all ranks and threads
        "ranks": ranks,
        "source": source.source,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _tell(summary, folder)
    return 0


@contextmanager
def _timed(folder: Path, part: str) -> Iterator[None]:
    """Adds the time of the block to that of the same part in earlier starts, also where the block is interrupted."""
    began, spent = time.perf_counter(), _cpu_seconds()
    try:
        yield
    finally:
        took = {_SECONDS: time.perf_counter() - began, _CPU_SECONDS: _cpu_seconds() - spent}
        for name, value in took.items():
            before = _read(folder / name)
            write_json(folder / name, {**before, part: before.get(part, 0.0) + value})


def _read(file: Path) -> dict[str, float]:
    values: dict[str, float] = read_given_object(file, _REMEDY) if file.exists() else {}
    return values


def _cpu_seconds() -> float:
    """Processor time of this process and of all that it has waited for, over all threads."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in spent)


def _settle(config: QuickstartJob, folder: Path) -> None:
    """Write down what this folder's quickstart is; refuse another one in it.

    Scores may change, and what the diffusion stage itself lets a resume change; of the autoencoder until its latents exist.
    """
    file, now = folder / "quickstart.json", redact.config(plain(config))
    if file.exists():
        changed = differences(read_given_object(file, _REMEDY), now)
        free: tuple[str, ...] = ("run.", "score.", "ranks", "overrides.diffusion")
        if not (folder / "latents").exists():
            free = (*free, "overrides.autoencoder")
        if faults := [
            f"{key}={new!r}, but {folder} was started with {old!r}: give another run.name to start a new one"
            for key, (old, new) in changed.items()
            if not key.startswith(free)
        ]:
            raise ConfigError(faults)
        if any(not key.startswith(("run.", "ranks")) for key in changed):
            (folder / "summary.json").unlink(missing_ok=True)  # it is of another length, or of other scores
        for key, (old, new) in changed.items():
            log.info("resuming with a change: %s was %r, is %r", key, old, new)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n")


def _ranks(wanted: int) -> int:
    """As many ranks as are wanted and divide the stages' batches (of 8 and of 64 samples)."""
    fitting = max(ranks for ranks in (1, 2, 4, 8) if ranks <= max(1, wanted))
    if fitting != wanted:
        log.info("the quickstart's small batches run on %d of %d ranks", fitting, wanted)
    return fitting


def _settings(values: dict[str, int | str | Path]) -> list[str]:
    """Overrides with values quoted for Hydra's grammar, whatever a path contains."""
    return [setting(key, value) for key, value in values.items()]


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
