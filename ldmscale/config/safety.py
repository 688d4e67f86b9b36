"""What is done about updates that must not be, about hangs, and about memory that does not suffice."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT, NotNegative


@dataclass(frozen=True, config=STRICT)
class SafetyConfig:
    """Updates with a loss or gradient that is not finite are always skipped by all ranks and written down."""

    # So many skipped updates in a row: back to the newest checkpoint, and on behind the samples that led there; 0: never.
    skips_before_rollback: NotNegative = 5
    max_rollbacks: NotNegative = 3  # without getting any further; then the run ends
    # Losses far above those of before: "log" tells, "skip" treats them like those that are not finite.
    spike: Literal["off", "log", "skip"] = "off"
    spike_window: Annotated[int, Field(ge=10)] = 200  # steps that a loss is compared with
    # in standard deviations above the median, estimated by the median of distances to it
    spike_threshold: Annotated[float, Field(gt=0)] = 10.0
    # Forward and backward of one micro-batch before the first step, without an update; "only": and nothing after it.
    dry_run: bool | Literal["only"] = True
    # of a collective: up to the end of the first step, which fetches, compiles and allocates, and from then on
    first_step_timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    step_timeout_minutes: Annotated[float, Field(gt=0)] = 15.0
    # each rank says what it does so often; at 0.8 of the timeouts above the watchdog names the rank that differs
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 15.0
