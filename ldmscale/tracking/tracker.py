"""One dictionary of metrics a log interval, to three places: the console, metrics.jsonl and W&B.

Rank 0 writes, others do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ldmscale.distributed.environment import Ranks
from ldmscale.tracking.console import ProgressDisplay
from ldmscale.tracking.images import tile, write_png
from ldmscale.tracking.metrics import MetricsFile
from ldmscale.tracking.wandb_run import WandbRun, start_wandb


class TrackingOptions(Protocol):
    """What the tracker wants to know of the configuration (`tracking` group)."""

    @property
    def wandb(self) -> Literal["auto", "off", "offline", "online"]: ...
    @property
    def project(self) -> str: ...
    @property
    def entity(self) -> str | None: ...
    @property
    def tags(self) -> tuple[str, ...]: ...
    @property
    def wandb_images_per_hour(self) -> int: ...


class Tracker:
    """Metrics and pictures of the run in `folder`.

    Not collective: every rank may call every method, only rank 0 acts.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        options: TrackingOptions,
        total_steps: int,
        *,
        name: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        fence: Callable[[], None] | None = None,
    ) -> None:
        """`name`: shown on the console and in W&B (the folder's unless given).

        `run_id`: of W&B, the same at every start of a run.

        `config`: plain values for W&B's table; secrets have no place in it.

        `fence`: called before anything is written; raises once another start has taken the run over.
        """
        self._folder = folder
        self._active = ranks.is_main
        self._wandb: WandbRun | None = None
        self._fence = fence or (lambda: None)
        if not self._active:
            return
        name = name or folder.resolve().name
        self._file = MetricsFile(folder / "metrics.jsonl")
        self._display = ProgressDisplay(total_steps, name)
        self._wandb = start_wandb(
            folder,
            options.wandb,
            run_id=run_id,
            name=name,
            project=options.project,
            entity=options.entity,
            tags=options.tags,
            config=config,
            images_per_hour=options.wandb_images_per_hour,
        )

    def resume_from(self, step: int) -> None:
        """The run goes on after `step` (0: it begins): later lines of metrics.jsonl are dropped, the bar
        starts there.
        """
        if self._active:
            self._fence()
            told = self._file.resume_from(step)
            self._display.start(step)
            if self._wandb is not None and told > step:
                # W&B takes nothing back: steps that are taken again would stand in its curves twice.
                self._wandb.go_on_after(told)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`; call it at steps that log nothing."""
        if self._active:
            self._display.advance(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of `step` to metrics.jsonl, the console and W&B.

        Keys are paths such as "loss/total".
        """
        if not self._active:
            return
        self._fence()
        self._file.write(step, metrics)
        self._display.show(step, metrics)
        if self._wandb is not None:
            self._wandb.log(step, metrics)

    def images(self, step: int, name: str, images: NDArray[np.uint8], captions: Sequence[str] = ()) -> None:
        """Write a picture, uint8 [H, W, 3], or a batch [N, H, W, 3] tiled into one, to samples/ and to W&B.

        The file is samples/step_00001000.png for the name "samples", samples/NAME_step_00001000.png for
        others.
        """
        if not self._active:
            return
        self._fence()
        picture = tile(images) if images.ndim == 4 else images
        prefix = "" if name == "samples" else name.replace("/", "_") + "_"
        write_png(self._folder / "samples" / f"{prefix}step_{step:08d}.png", picture, captions)
        if self._wandb is not None:
            caption = "\n".join(f"{number}. {text}" for number, text in enumerate(captions, start=1))
            self._wandb.log_image(step, name, picture, caption or None)

    def close(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """End the display, the file and the W&B run.

        "stopped": by a signal or a time limit, to be run again.
        """
        if not self._active:
            return
        self._display.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.close(status)
