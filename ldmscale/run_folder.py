"""The folder in which one run lives: where its files are, its resolved configuration, and its identity."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from ldmscale.config import JOBS
from ldmscale.distributed.lease import Lease, check_held, take
from ldmscale.errors import ConfigError
from ldmscale.validate import differences, plain, read

log = logging.getLogger(__name__)

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


class RunFolder:
    """Paths of one run, and the two small files that tell what it is: config.yaml and run.json."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config_file = self.path / "config.yaml"
        self.identity_file = self.path / "run.json"
        self.checkpoints = self.path / "checkpoints"
        self.averages = self.path / "averages"
        self.samples = self.path / "samples"
        self.skipped_steps = self.path / "skipped_steps.jsonl"
        self.ledger = self.path / "data_ledger.jsonl"
        self.tokenizer = self.path / "tokenizer"
        self.text_embeddings = self.path / "text_embeddings"
        self.classes = self.path / "classes.json"
        self.lease = self.path / "lease"

    def changes(self, config: Mapping[str, Any]) -> list[str]:
        """What a resume with `config` changes that it may change, as sentences; nothing in a new run.

        Raises ConfigError naming each key that must not change.
        """
        if not self.config_file.exists():
            return []
        changed = differences(_completed(self.config()), config)
        fixed = {k: v for k, v in changed.items() if not k.startswith(FREE_KEYS)}
        if fixed:
            raise ConfigError(
                [
                    f"{key}={new!r}, but {self.path} was started with {old!r}: give {key}={old} to go on with that run, "
                    "or another run.name to start a new one"
                    for key, (old, new) in fixed.items()
                ]
            )
        return [f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items()]

    def settle_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml in a new run; an old one keeps what it was started with."""
        if not self.config_file.exists():
            _write(self.config_file, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with. Raises ConfigError where the folder is no run."""
        try:
            return cast(dict[str, Any], yaml.safe_load(self.config_file.read_text()))
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} is not a run folder: it has no config.yaml; give the folder of a run"
            ) from None

    def identity(self) -> dict[str, Any]:
        """run.json: the W&B id, the number of attempts, and whether the run has finished."""
        if not self.identity_file.exists():
            return {"wandb_id": secrets.token_hex(4), "attempts": 0, "finished_step": None}
        return cast(dict[str, Any], json.loads(self.identity_file.read_text()))

    def hold(
        self,
        *,
        timeout_seconds: float = 60.0,
        wait_seconds: float = 0.0,
        on_lost: Callable[[], None] | None = None,
    ) -> Lease:
        """Keep other starts of this run away until the lease is released; rank 0 only.

        Raises LeaseHeldError where another start holds the folder after `wait_seconds`.
        """
        return take(
            self.lease,
            timeout_seconds=timeout_seconds,
            wait_seconds=wait_seconds,
            on_lost=on_lost or (lambda: None),
        )

    def check_held(self, number: int) -> None:
        """Raise LeaseLostError if a later start than the `number`th holds the folder. Any rank may ask."""
        check_held(self.lease, number)

    def begin_attempt(self, number: int) -> dict[str, Any]:
        """Note that the run starts for the `number`th time, on rank 0 only, and return the identity."""
        identity = self.identity()
        identity |= {"attempts": number, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.note(identity)
        self.samples.mkdir(parents=True, exist_ok=True)
        self.ledger.touch()
        return identity

    def note(self, identity: Mapping[str, Any]) -> None:
        """Replace run.json as a whole, so that no reader meets half of it."""
        _write(self.identity_file, json.dumps(dict(identity), indent=2) + "\n")

    def finished_step(self) -> int | None:
        """The step at which the run ended as asked, or None."""
        step = self.identity().get("finished_step")
        return int(step) if step is not None else None


def is_foreign(path: Path) -> bool:
    """Whether a file or folder is a model of another format, or an imported one, and no run of ours."""
    if path.is_file():
        return True
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        return False
    patterns = ("model.json", "model_index.json", "config.json", "*/config.json", "*.ckpt", "*.safetensors")
    return any(file for pattern in patterns for file in path.glob(pattern))


def latents_folder(path: str) -> Path:
    """Where logs, ledger and submissions of a set of latents lie: in it; of one in a store, here, in runs/latents/."""
    return Path("runs", "latents", path.split("://", 1)[1].strip("/")) if "://" in path else Path(path)


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """With defaults for the settings that the version which began the run did not have yet."""
    job = JOBS.get(str(values.get("job")))
    if job is None:
        return values
    try:
        return plain(read(job, values))
    except ConfigError:  # a setting that is no more: it is told as a difference
        return values


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
