"""Work of every rank and then of rank 0, in threads beside the training, with an outcome that all ranks agree on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ldmscale.distributed import collectives
from ldmscale.errors import CheckpointError, DataError, LdmscaleError
from ldmscale.waiting import Wait

R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """How it ended, the same on all ranks."""

    failures: tuple[str, ...] = ()
    final: bool = False  # no later attempt of this process can do better


class TwoParts(Generic[R]):
    """`everywhere` runs on each rank; when all have done it, `on_main` runs on rank 0 with their results.

    With `before`, a function and its name in messages, rank 0 runs that first, and `everywhere` begins on no rank until it
    has ended. None of them contains a collective. `advance` does: all ranks call it together, while none of them is `busy`.
    Results must pickle and be small. `what` names the two parts in messages.
    """

    def __init__(
        self,
        rank: int,
        everywhere: Callable[[], R],
        on_main: Callable[[list[R]], None],
        what: tuple[str, str],
        *,
        before: tuple[Callable[[], None], str] | None = None,
    ) -> None:
        self._rank, self._everywhere, self._on_main, self._what = rank, everywhere, on_main, what
        self._main: Background[None] | None = None  # what rank 0 does alone, before or after the others
        self._main_name = ""
        self._first: Background[R] | None = None
        if before is None:
            self._first = Background(everywhere, what[0])
        else:
            self._begin_on_main(*before)

    @property
    def _work(self) -> Background[Any] | None:
        return self._main if self._main_name else self._first

    @property
    def busy(self) -> bool:
        """Whether this rank is still at work on the present part."""
        return self._work is not None and not self._work.done

    def wait(self) -> None:
        """Until this rank is not busy."""
        if self._work is not None:
            self._work.wait()

    def advance(self) -> Outcome | None:
        """Agree on the part that has ended, and begin the next; the outcome once all have ended."""
        if self._main_name:
            outcome = self._outcome_on_main()
            if self._first is not None or outcome.failures:
                return outcome
            self._main_name = ""
            self._first = Background(self._everywhere, self._what[0])
            return None
        assert self._first is not None
        error = self._first.error
        failed = None if error is None else f"rank {self._rank} could not {self._what[0]}: {error!r}"
        value = self._first.value if error is None else None
        reports = collectives.gather_lists([(failed, _final(error), value)])
        if failures := tuple(failure for failure, _, _ in reports if failure is not None):
            return Outcome(failures, any(final for _, final, _ in reports))
        results = [result for _, _, result in reports if result is not None]
        self._begin_on_main(lambda: self._on_main(results), self._what[1])
        return None

    def _begin_on_main(self, work: Callable[[], None], name: str) -> None:
        self._main_name = name
        self._main = Background(work, name) if self._rank == 0 else None

    def _outcome_on_main(self) -> Outcome:
        error = None if self._main is None else self._main.error
        failures = () if error is None else (f"rank 0 could not {self._main_name}: {error!r}",)
        return collectives.broadcast_object(Outcome(failures, _final(error)))


def _final(error: BaseException | None) -> bool:
    """Whether later checkpoints fail, too: errors of ldmscale, but those about one checkpoint or of a store that does
    not answer.
    """
    return isinstance(error, LdmscaleError) and not isinstance(error, (CheckpointError, DataError))


T = TypeVar("T")
_LONGEST_SECONDS = 6 * 3600.0  # for one part of a save or an upload
_JOIN_SECONDS = 0.5


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
        """Until it is done. Not ended by a stop request: what it saves is what a stop waits for."""
        wait = Wait(
            f"the thread that is to {self._thread.name}; is its file system or store slow, or away",
            limit_seconds=_LONGEST_SECONDS,
            remedy="look at the file system or store, and start the same command again from the checkpoint before",
            obeys_stop=False,
        )
        while self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
            wait.check()

    @property
    def value(self) -> T:
        """What the work returned; only where it is done and `error` is None."""
        return self._value[0]
