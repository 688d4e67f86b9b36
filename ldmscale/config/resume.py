"""Compares the configuration of a run folder with the one that resumes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldmscale import redact
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import JOBS
from ldmscale.config.typed import differences, plain, read
from ldmscale.errors import ConfigError

# Keys that a resume may change: how it runs, how long, and where its data lie (their fingerprint is checked).
# A longer run stretches a decaying learning rate; that is said like every change.
FREE_KEYS = (
    "run.", "checkpoint.", "ema.store_every_steps", "safety.", "tracking.", "preview.", "zero.", "scale_samples", "warm_start",
    "train.max_steps", "train.log_every_steps", "train.rank_micro_batch", "train.attention", "train.compile",
    "train.garbage_every_steps",
    "data.shards", "data.heldout_shards", "data.workers", "data.max_bad_share", "data.max_bad_in_a_row",
    "data.allow_pipe", "data.storage.", "train.global_batch", "first_stage.path",
    "diffusion.loss_bins",
    "text_encoder.path", "text_encoder.precompute", "unet.checkpointing", "text_encoder.checkpointing", "autoencoder.checkpointing",
    "validation.", "generation.", "codebook.usage_window_steps", "codebook.alarm_usage",
)  # fmt: skip


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """With defaults for the settings that the version which began the run did not have yet."""
    job = JOBS.get(str(values.get("job")))
    if job is None:
        return values
    try:
        return plain(read(job, values))
    except ConfigError:  # a setting that is no more: it is told as a difference
        return values


def changes(folder: RunFolder, config: Mapping[str, Any]) -> list[str]:
    """What a resume with `config` changes that it may change, as sentences; nothing in a new run.

    Raises ConfigError naming each key that must not change.
    """
    if not folder.config_file.exists():
        return []
    found = folder.config()
    if found.get("job") != config.get("job"):
        raise ConfigError(
            f"{folder.path} holds a run of the job {found.get('job')}, and this is {config.get('job')}: give another run.name "
            f"(or run.dir), or start `ldmscale {found.get('job')}` to resume that run"
        )
    old = _completed(found)
    # A file keeps no secret to compare with. Those of the command line count.
    shown = differences(redact.config(old), redact.config(config))
    changed = {key: shown[key] for key in differences(old, config) if key in shown}
    fixed = {k: v for k, v in changed.items() if not k.startswith(FREE_KEYS)}
    if fixed:
        raise ConfigError(
            [
                f"{key}={new!r}, but {folder.path} was started with {old!r}: give {key}={old} to go on with that run, "
                "or another run.name to start a new one"
                for key, (old, new) in fixed.items()
            ]
        )
    return [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items()]
