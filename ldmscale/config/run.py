"""Where one run lives, and where it reports to."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Where one run lives."""

    name: str  # names the folder and the W&B run
    dir: str  # the run folder; runs/<name> unless given


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    project: str = "ldmscale"
    entity: str | None = None
    tags: tuple[str, ...] = ()
