"""Where one run lives, and where it reports to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT, NotNegative


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Where one run lives."""

    name: str  # names the folder and the W&B run
    dir: str  # the run folder; runs/<name> unless given
    max_hours: Annotated[float, Field(gt=0)] | None = None  # then it saves and ends with 75; null: no limit
    # the same so long before the end of the Slurm allocation, where Slurm tells it
    margin_minutes: Annotated[float, Field(ge=0)] = 5.0
    wait: bool = False  # wait while another start holds the run folder, instead of ending with 2
    lease_seconds: Annotated[float, Field(ge=1)] = 60.0  # a start without a sign of life for so long is over


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    project: str = "ldmscale"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    wandb_images_per_hour: NotNegative = 120  # pictures beyond that stay in samples/ only
