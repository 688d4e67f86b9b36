"""What a person sees of the training loop: a progress bar with the time left on a terminal, plain aligned
lines elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ldmscale import messages

# What a line shows, if the metrics have it: keys (the first that is there), short name, format, width in
# plain lines.
_SHOWN = (
    (("loss/total",), "loss", "{:.4f}", 12),
    (("throughput/images_per_second",), "images/s", "{:.1f}", 16),
    (("lr", "generator/lr"), "lr", "{:.2e}", 11),
    (("time/data_wait_share",), "wait", "{:.0%}", 9),
)

_LONGEST_TITLE = 100  # characters: the name of a run

_terminal: Console | None = None


def terminal() -> Console:
    """The one console on standard error: bars and log lines must share it, or they overwrite each other."""
    global _terminal
    if _terminal is None:
        _terminal = Console(stderr=True)
    return _terminal


class ProgressDisplay:
    """Shows how far a job is. Rank 0 makes one; `console` is for tests."""

    def __init__(self, total_steps: int, title: str, console: Console | None = None) -> None:
        self._console = console or terminal()
        self._total = total_steps
        self._title = messages.name(title, _LONGEST_TITLE)
        self._first_step: int | None = None
        self._first_time = time.monotonic()
        self._live: Live | None = None
        # The metrics stand under the bar: beside it, they would leave no room for the time left on 80
        # columns.
        self._metrics = Text("", no_wrap=True, overflow="ellipsis")
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(self._title, total=total_steps)

    def start(self, step: int = 0) -> None:
        """Begin to show, at `step`."""
        self._first_step = step
        self._first_time = time.monotonic()
        if self._console.is_terminal and self._live is None:
            self._bar.reset(self._task, completed=step)
            self._live = Live(Group(self._bar, self._metrics), console=self._console, refresh_per_second=4)
            self._live.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step` without new metrics. Cheap; does nothing where there is no bar."""
        if self._live is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of `step`, those that a person watches; nothing if there are none of them."""
        if self._first_step is None:
            self.start(step)
        shown = []
        for keys, name, form, wide in _SHOWN:
            key = next((key for key in keys if key in metrics), None)
            if key is not None:
                shown.append(f"{name} {form.format(metrics[key])}".ljust(wide))
        self.advance(step)
        if not shown:
            return
        if self._live is not None:
            self._metrics.plain = "  ".join(shown)
            return
        count = f"{step:>{len(str(self._total))}}/{self._total}"
        line = "  ".join([f"{self._title} {count}", *shown, f"left {self._time_left(step)}"])
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """End the display and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _time_left(self, step: int) -> str:
        done = step - (self._first_step or 0)
        if done <= 0:
            return "?"
        seconds = int((time.monotonic() - self._first_time) / done * max(self._total - step, 0))
        hours, minutes = seconds // 3600, seconds % 3600 // 60
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
