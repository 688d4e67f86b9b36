"""Where a checkpoint comes from: what its manifest says of the run, the code and the machine that wrote it."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def about_run(config: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for a manifest: the configuration and its hash, W&B's id, the start of the run, host, revision."""
    return {
        "config": dict(config),
        "config_sha256": config_hash(config),
        "wandb_id": identity.get("wandb_id"),
        "attempt": identity.get("attempts"),
        "host": socket.gethostname(),
        "git_revision": git_revision(),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


# Beside this file in code that `submit` has frozen: the revision that was frozen.
REVISION = "REVISION"


def git_revision() -> str | None:
    """The commit of the checkout that runs or was frozen, with "+" where files differ from it; None where there is none."""
    home = Path(__file__).resolve().parents[1]
    frozen = Path(__file__).with_name(REVISION)
    if frozen.is_file():
        return frozen.read_text().strip() or None
    if not (home / ".git").exists():
        return None
    try:
        revision = _git(home, "rev-parse", "HEAD")
        return revision + ("+" if _git(home, "status", "--porcelain", "--", "ldmscale", "conf") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
