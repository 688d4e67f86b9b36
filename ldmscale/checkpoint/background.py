"""Work that goes on beside the training: one thread, whose outcome is asked for later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs `work` in a thread at once. It must contain no collective: those belong to the training's thread."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = work
        self._value: list[T] = []
        self.error: BaseException | None = None
        # A daemon: a process whose training failed must not wait for a disk that does not answer.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # whoever asks for the outcome gets it
            self.error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    @property
    def value(self) -> T:
        """What the work returned; only where it is done and `error` is None."""
        return self._value[0]
