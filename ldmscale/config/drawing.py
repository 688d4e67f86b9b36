"""What is drawn from a trained model, and how the quickstart scores it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ldmscale.config.values import STRICT, NotNegative, Positive


@dataclass(frozen=True, config=STRICT)
class SampleConfig:
    """What is drawn from a trained model."""

    model: str  # run folder
    prompts: str | tuple[str, ...]  # a prompt, a list, a file of one prompt a line, or "-" for standard input
    out: str | None  # folder for PNGs and the grid; the samples/drawn of the model unless given
    steps: Positive = 50
    sampler: Literal["ddim"] = "ddim"
    eta: float = 0.0
    guidance: float = 5.0
    images_per_prompt: Positive = 1
    first_seed: NotNegative = 0
    ema: bool | str = True  # true, false, or another average by its name: ema_0.999, power_0.08
    rank_batch: Positive = 16
    precision: Literal["bf16", "fp32"] = "fp32"


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """How the quickstart measures what it trained."""

    sampler_steps: Positive = 50
    guidance: float = 3.0
    nearest: Positive = 5  # an image counts as found when it is among so many nearest ones
    # Drawn and scored, evenly chosen: a large folder has more captions than a CPU can draw.
    max_captions: Positive = 1000
    grid_prompts: Annotated[int, Field(ge=2)] = 12
