"""W&B's own settings in this environment: its mode, its server, and whether there is a key for it."""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

_SERVER_SECONDS = 3.0  # how long "auto" waits for the server before it chooses offline

Mode = Literal["online", "offline", "shared", "disabled"]
# Values of WANDB_MODE and of W&B's settings files that mean another one.
_OLD_NAMES: dict[str, Mode] = {"dryrun": "offline", "run": "online"}


def wandb_settings() -> Any:
    """What WANDB_* variables and W&B's settings files say."""
    import wandb

    settings = wandb.Settings()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings.settings_system = str(folder / "settings")
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    return settings


def choose_mode(wanted: Literal["auto", "offline", "online"]) -> Mode:
    """The mode that W&B is opened in.

    "auto": what W&B's own environment says (WANDB_MODE, `wandb offline`, `wandb disabled`). Where that says nothing: online
    if there is a key and the server answers, else offline. The others insist.
    """
    if wanted != "auto":
        return wanted
    settings = wandb_settings()
    mode: Mode = _OLD_NAMES.get(settings.mode, settings.mode)
    if mode != "online" or os.environ.get("WANDB_MODE"):
        return mode
    return "online" if _has_key(settings) and _answers(settings.base_url) else "offline"


def check_key(wanted: str) -> list[str]:
    """The fault of `tracking.wandb=online` without a key. W&B would ask for one, and a job cannot answer."""
    if wanted != "online" or _has_key(settings := wandb_settings()):
        return []
    return [
        f"tracking.wandb=online, but there is no key for {settings.base_url}: run `wandb login`, or set WANDB_API_KEY; "
        "tracking.wandb=offline records the run for `wandb sync`"
    ]


def _has_key(settings: Any) -> bool:
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def _answers(base_url: str) -> bool:
    """Does the server (or the proxy before it) accept a connection?"""
    parts = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or base_url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_SERVER_SECONDS):
            return True
    except (OSError, ValueError):
        return False
