"""The folder in which one run lives: where its files are, its resolved configuration, and its identity."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, Field

from ldmscale import redact
from ldmscale.errors import ConfigError
from ldmscale.storage.atomic import write_json, write_text
from ldmscale.storage.digest import sha256
from ldmscale.storage.lease import Lease, check_held, take
from ldmscale.storage.names import WANDB_ID, shown
from ldmscale.storage.plain_values import Count, bounded, checked, parsed_object
from ldmscale.waiting import WaitTimeoutError, finished

log = logging.getLogger(__name__)


class _Identity(BaseModel):
    """run.json, as far as it is read again. More may stand in it."""

    wandb_id: Annotated[str, Field(pattern=f"^{WANDB_ID.pattern.pattern}$")] | None = None
    attempts: Count = 0
    finished_step: Count | None = None
    text_encoder: dict[str, Any] = {}


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

    def settle_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml in a new run, without secrets; an old one keeps what it was started with."""
        if not self.config_file.exists():
            kept = redact.config(config)
            write_text(self.config_file, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    def config(self) -> dict[str, Any]:
        """The configuration that the run was started with. Raises ConfigError where the folder is no run.

        What came from environment variables is read from them again, where they are set.
        """
        try:
            # Bounded first: to resolve copies what the file repeats.
            values = bounded(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))
            if not isinstance(values, dict):
                raise ValueError(f"found {shown(values)}, expected keys with values")
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} is not a run folder: it has no config.yaml; give the folder of a run"
            ) from None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{self.config_file} is damaged ({str(error).splitlines()[0]}): restore it from a copy, or give another run.name"
            ) from error
        return cast(dict[str, Any], redact.resolve(values))

    def identity(self) -> dict[str, Any]:
        """run.json: the W&B id, the number of attempts, and whether the run has finished.

        Raises ConfigError where the file is damaged.
        """
        try:
            content = self.identity_file.read_bytes()
            values = parsed_object(content)
            checked(_Identity, values)
        except FileNotFoundError:
            return {"wandb_id": secrets.token_hex(4), "attempts": 0, "finished_step": None}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.identity_file} is damaged ({error}): restore it from a copy, or delete it, which gives the run another "
                "W&B run"
            ) from error
        return values

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
        """Record the `number`th start of the run, rank 0 only, and return the identity.

        A finished run that is trained further counts as unfinished until it reaches its new last step.
        """
        identity = self.identity()
        identity.pop("fault", None)
        identity |= {
            "attempts": number,
            "finished_step": None,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self.note(identity)
        self.samples.mkdir(parents=True, exist_ok=True)
        self.ledger.touch()
        return identity

    def note(self, identity: Mapping[str, Any]) -> None:
        """Replace run.json as a whole, so that no reader meets half of it."""
        write_json(self.identity_file, dict(identity))

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


def about_run(config: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for a manifest: the configuration without secrets and its hash, W&B's id, the start of the run, ..."""
    kept = redact.config(config)
    return {
        "config": kept,
        "config_sha256": config_hash(kept),
        "wandb_id": identity.get("wandb_id"),
        "attempt": identity.get("attempts"),
        "host": socket.gethostname(),
        "git_revision": git_revision(),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, whatever the order of its keys."""
    return sha256(json.dumps(config, sort_keys=True))


# In the package folder of code that `submit` has frozen: the revision that was frozen.
REVISION = "REVISION"


def git_revision() -> str | None:
    """The commit of the checkout that runs or was frozen, with "+" where its files were changed; None where there is none."""
    home = Path(__file__).resolve().parents[2]
    frozen = Path(__file__).resolve().parents[1] / REVISION
    if frozen.is_file():
        return frozen.read_text().strip() or None
    if not (home / ".git").exists():
        return None
    try:
        revision = _git(home, "rev-parse", "HEAD")
        return revision + (
            "+"
            if _git(home, "status", "--porcelain", "--untracked-files=no", "--", "ldmscale", "conf")
            else ""
        )
    except (OSError, subprocess.SubprocessError, WaitTimeoutError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = finished(command, cause=f"git, which looks at {folder}", limit_seconds=20.0)
    done.check_returncode()
    return done.stdout.decode("utf-8", "replace").strip()
