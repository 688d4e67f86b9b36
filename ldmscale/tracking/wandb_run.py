"""The W&B run of a run folder: optional, on rank 0 only, offline by itself where there is no key or no
network.

Nothing here raises into training: what W&B does wrong after the start is logged once, and the run continues without it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldmscale import redact
from ldmscale.errors import ConfigError
from ldmscale.tracking.wandb_environment import Mode, choose_mode
from ldmscale.waiting import announced

log = logging.getLogger(__name__)

_INIT_SECONDS = 60.0
_FINISH_SECONDS = 120.0
_IMAGES_PER_HOUR = 120


class WandbRun:
    """An open W&B run.

    Every method logs failures instead of raising; after the first one the run is given up.
    """

    def __init__(self, run: Any, mode: Mode, images_per_hour: int = _IMAGES_PER_HOUR) -> None:
        self._run = run
        self.mode = mode
        self._images_per_hour, self._image_times = images_per_hour, deque[float]()
        self._sent = 0  # steps up to here are with W&B already

    def go_on_after(self, step: int) -> None:
        """Send nothing of the steps up to `step`: an earlier start of the run sent them, and they are taken again."""
        self._sent = step
        # What the earlier start could not send any more is missing there: the server knows how far it got.
        if self.mode == "online":
            known = self._run.summary.get("step") if self._run is not None else None
            self._sent = min(step, int(known)) if isinstance(known, (int, float)) else step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one dictionary of metrics.

        The step is a metric of its own: W&B's internal one cannot go back on resume.
        """
        if step > self._sent:
            self._guarded("log metrics", lambda: self._run.log({"step": step, **metrics}))

    def log_image(self, step: int, name: str, image: NDArray[np.uint8], caption: str | None = None) -> None:
        """Send one picture, uint8 [H, W, 3], unless the hour's budget is used up."""
        if step <= self._sent or self._run is None:
            return
        now = time.monotonic()
        while self._image_times and now - self._image_times[0] > 3600:
            self._image_times.popleft()
        if len(self._image_times) >= self._images_per_hour:
            log.info(
                "%s of step %d is not sent to W&B: %d pictures went there within the hour "
                "(tracking.wandb_images_per_hour); the file is in samples/",
                name,
                step,
                len(self._image_times),
            )
            return
        self._image_times.append(now)
        import wandb

        self._guarded(
            "log a picture", lambda: self._run.log({"step": step, name: wandb.Image(image, caption=caption)})
        )

    def close(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """End the run. A stopped run is marked preempting: W&B then expects it to come back."""
        if status == "stopped":
            self._guarded("mark the run preempting", lambda: self._run.mark_preempting())
        exit_code = {"finished": 0, "stopped": 75, "failed": 1}[status]
        with announced(f"the server of W&B, for {_FINISH_SECONDS:.0f} s at most"):
            self._guarded("finish", lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def _guarded(self, what: str, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # any failure of a tracker must leave the training alone
            log.warning(
                "W&B could not %s (%s); the run goes on without W&B, metrics.jsonl has everything",
                what,
                error,
            )
            self._run = None


def start_wandb(
    folder: Path,
    mode: Literal["auto", "off", "offline", "online"],
    *,
    run_id: str | None,
    name: str,
    project: str,
    entity: str | None = None,
    tags: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    images_per_hour: int = _IMAGES_PER_HOUR,
) -> WandbRun | None:
    """Open the W&B run `run_id` with its files in folder/wandb, or resume it; None if it is off.

    "auto" is `wandb_environment.choose_mode`; None also where it cannot be opened. Raises ConfigError where "offline" or
    "online" cannot be opened.
    """
    if mode == "off":
        return None
    try:
        import wandb

        settings = wandb.Settings(
            console="off",  # W&B would wrap the streams that the progress bar draws on
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
        )
        chosen = choose_mode(mode)
        if chosen == "disabled":
            log.info("W&B is disabled by its own environment (WANDB_MODE or `wandb disabled`)")
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with _no_answers(), _shown_arguments(), announced("the server of W&B, for 60 s at most"):
            run = wandb.init(
                dir=str(folder),
                mode=chosen,
                id=run_id,
                resume="allow" if chosen == "online" and run_id else None,  # means nothing to an offline run
                name=name,
                project=project,
                entity=entity,
                tags=[redact.text(tag) for tag in tags],
                config=redact.config(config or {}),
                settings=settings,
            )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
    except Exception as error:  # see WandbRun._guarded
        if mode != "auto":
            raise ConfigError(
                f"tracking.wandb={mode}, but W&B cannot be used ({error}): mend that, or give tracking.wandb=auto, which trains "
                "without it"
            ) from error
        log.warning(
            "W&B cannot be used (%s); the run goes on without it, metrics.jsonl has everything", error
        )
        return None
    log.info("W&B is %s in %s", chosen, folder / "wandb")
    return WandbRun(run, chosen, images_per_hour)


@contextmanager
def _no_answers() -> Iterator[None]:
    """Empty standard input: without a key W&B asks for one on a terminal and waits, and takes prompts of a job for it."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


@contextmanager
def _shown_arguments() -> Iterator[None]:
    """The command line without secrets: W&B keeps it with the run."""
    before = sys.argv
    sys.argv = [redact.text(word) for word in before]
    try:
        yield
    finally:
        sys.argv = before
