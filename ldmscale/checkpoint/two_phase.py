"""Work of every rank and then of rank 0, in threads beside the training, with an outcome that all ranks agree on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ldmscale.distributed import collectives
from ldmscale.errors import CheckpointError, LdmscaleError

R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """How it ended, the same on all ranks."""

    failures: tuple[str, ...] = ()
    final: bool = False  # no later attempt of this process can do better


class TwoParts(Generic[R]):
    """`everywhere` runs on each rank at once; when all have done it, `on_main` runs on rank 0 with their results.

    Neither contains a collective. `advance` does: all ranks call it together, while none of them is `busy`.
    Results must pickle and be small. `what` names the two parts in messages.
    """

    def __init__(
        self,
        rank: int,
        everywhere: Callable[[], R],
        on_main: Callable[[list[R]], None],
        what: tuple[str, str],
    ) -> None:
        self._rank, self._on_main, self._what = rank, on_main, what
        self._first = Background(everywhere, what[0])
        self._second: Background[None] | None = None
        self._agreed = False  # on the first part

    @property
    def _work(self) -> Background[Any] | None:
        return self._second if self._agreed else self._first

    @property
    def busy(self) -> bool:
        """Whether this rank is still at work on the present part."""
        return self._work is not None and not self._work.done

    def wait(self) -> None:
        """Until this rank is not busy."""
        if self._work is not None:
            self._work.wait()

    def advance(self) -> Outcome | None:
        """Agree on the part that has ended, and begin the next; the outcome once both have ended."""
        if self._agreed:
            error = None if self._second is None else self._second.error
            told = () if error is None else (f"rank 0 could not {self._what[1]}: {error!r}",)
            return collectives.broadcast_object(Outcome(told, _final(error)))
        error = self._first.error
        failed = None if error is None else f"rank {self._rank} could not {self._what[0]}: {error!r}"
        value = self._first.value if error is None else None
        reports = collectives.gather_lists([(failed, _final(error), value)])
        if failures := tuple(failure for failure, _, _ in reports if failure is not None):
            return Outcome(failures, any(final for _, final, _ in reports))
        self._agreed = True
        if self._rank == 0:
            results = [result for _, _, result in reports if result is not None]
            self._second = Background(lambda: self._on_main(results), self._what[1])
        return None


def _final(error: BaseException | None) -> bool:
    """What ldmscale raises on purpose, and is not about this one checkpoint, holds for all later ones."""
    return isinstance(error, LdmscaleError) and not isinstance(error, CheckpointError)


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
