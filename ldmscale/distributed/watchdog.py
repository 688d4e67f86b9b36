"""What every rank is doing, on the shared run folder, and a watchdog that names the rank which holds up the others.

    RUN/heartbeat/rank_00000.json    {"step": 120, "phase": "step", "phase_seconds": 0.4, "host": ...}, rewritten by a thread

A collective that one rank never enters keeps all others waiting without a word. The thread goes on beating while the
training waits, so a rank that beats and stays in one phase is waiting or stuck, and one that does not beat is stopped, dead
or cut off. Ages are differences between modification times of one file system; clocks are never compared. No torch here.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldmscale.distributed.environment import Ranks
from ldmscale.storage.atomic import write_json
from ldmscale.storage.plain_values import Count, checked, parsed_object
from ldmscale.waiting import announced

log = logging.getLogger(__name__)

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h: failed, and worth another attempt
_SILENT_BEATS = 4  # a rank that missed so many beats is called silent
_FOLDER = "heartbeat"
_LONGEST = 1 << 16  # bytes of a beat
_SECONDS_TO_END = 60.0
_SECONDS_TO_DUMP = 10.0
_SHORT = ("data", "step", "save")  # phases of every step; pictures and measurements may take longer


@dataclass(frozen=True)
class Beat:
    """What one rank said last, and how long ago."""

    rank: Annotated[int, Field(strict=True, ge=0, lt=1 << 24)]
    host: str
    pid: int
    attempt: Count
    step: int
    phase: str
    phase_seconds: float  # in this phase already, when it said so
    age_seconds: float = 0.0  # since it said so


class Heartbeat:
    """Says what this rank does, and ends it when one phase lasts too long.

    `enter` costs two assignments; the files are the thread's business. `on_hang` gets the sentence that names the odd rank
    and ends the process; it is called from the thread, once.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        attempt: int,
        every_seconds: float,
        first_timeout_seconds: float,
        timeout_seconds: float,
        on_hang: Callable[[str], None] | None = None,
        before_end: Callable[[], object] | None = None,
    ) -> None:
        """`first_timeout_seconds`: for a phase before the end of the first step, where networks are built and kernels
        are compiled, and for pictures and measurements; `timeout_seconds`: for fetching, a step or a save from then on;
        0 of either: never. `before_end` is called before the process ends, to write down what else is known.
        """
        self._folder, self._ranks, self._attempt = folder, ranks, attempt
        self._every, self._first, self._later = every_seconds, first_timeout_seconds, timeout_seconds
        self._on_hang, self._before_end = on_hang or self._end, before_end
        self._step, self._phase, self._since = 0, "start", time.monotonic()
        self._warm = False
        self._ended = threading.Event()
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """From now on this rank is in `phase`, after `step` optimiser steps."""
        self._warm = self._warm or (step > self._step and self._phase != "start")
        self._step, self._phase, self._since = step, phase, time.monotonic()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """This rank is in `phase` for the duration of the block, then back in the one before."""
        before = self._phase
        self.enter(phase, self._step)
        try:
            yield
        finally:
            self.enter(before, self._step)

    def close(self) -> None:
        """Say that this rank has ended, and stop watching."""
        self.enter("end", self._step)
        self._ended.set()
        with announced("the thread of the heartbeat; does the file system of the run folder answer"):
            self._thread.join(_SECONDS_TO_END)  # longer only where the store does not answer

    def _beat(self) -> None:
        while True:
            with suppress(OSError):  # a store that does not answer: the next beat may reach it
                self._write()
            if self._ended.wait(self._every):
                with suppress(OSError):
                    self._write()
                return
            limit = self._later if self._warm and self._phase in _SHORT else self._first
            waited = time.monotonic() - self._since
            if limit and waited > limit:
                verdict = self._verdict(waited)
                self._on_hang(verdict)
                return

    def _write(self) -> None:
        beat = Beat(
            self._ranks.rank,
            socket.gethostname(),
            os.getpid(),
            self._attempt,
            self._step,
            self._phase,
            round(time.monotonic() - self._since, 1),
        )
        path = _file(self._folder, self._ranks.rank)
        write_json(path, asdict(beat), indent=None, durable=False)

    def _verdict(self, waited: float) -> str:
        try:
            beats = read_beats(self._folder)
        except OSError as error:
            return f"no step for {waited:.0f} s, and the heartbeats of the others cannot be read: {error}"
        here = f"rank {self._ranks.rank} has been in phase {self._phase} for {waited:.0f} s"
        return f"{here}; {odd_ranks(beats, self._ranks.size, self._attempt, self._every)}"

    def _end(self, verdict: str) -> None:
        """Tell the log, leave the stacks of all threads beside it, give the other ranks time to do the same, and end."""
        log.critical("the training hangs: %s", verdict)
        with suppress(OSError):
            self._accuse()
        with suppress(OSError):
            path = self._folder / "logs" / f"stacks_{self._ranks.rank:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(f"{time.strftime('%F %T')} attempt {self._attempt}: {verdict}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            log.info("the stacks of this rank are in %s", path)
        self._write_down()
        time.sleep(2 * self._every)  # the others find the same within one beat, and write their stacks too
        logging.shutdown()
        os._exit(EXIT_HUNG)

    def _write_down(self) -> None:
        """Calls `before_end` in a thread of its own: it may wait for what hangs."""
        before_end = self._before_end
        if before_end is None:
            return

        def call() -> None:
            try:
                before_end()
            except Exception as error:  # the process ends whatever happens
                log.error(
                    "what this rank was doing cannot be written down: %s: %s", type(error).__name__, error
                )

        thread = threading.Thread(target=call, name="before the end", daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_DUMP)

    def _accuse(self) -> None:
        """Inside a Slurm job, have hosts that fell silent left out when it is queued again (slurm/job.sbatch)."""
        if "SLURM_JOB_ID" not in os.environ:
            return
        bad = self._folder / "bad_nodes.txt"
        known = set(bad.read_text(errors="replace").split()) if bad.exists() else set()
        beats = [beat for beat in read_beats(self._folder) if beat.attempt == self._attempt]
        for host in silent_hosts(beats, self._every):
            if host not in known:
                log.critical("%s is left out from now on: no rank there has shown life (%s)", host, bad)
                with open(bad, "a") as file:
                    file.write(host + "\n")


def read_beats(folder: Path) -> list[Beat]:
    """What every rank of the run in `folder` said last, by rank."""
    beats = []
    with tempfile.TemporaryFile(dir=folder) as probe:  # the file system's own clock
        now = os.fstat(probe.fileno()).st_mtime
    for path in sorted((folder / _FOLDER).glob("rank_*.json")):
        with suppress(OSError, ValueError, TypeError):
            with open(path) as file:
                said = parsed_object(file.read(_LONGEST))
                age = now - os.fstat(file.fileno()).st_mtime
            beats.append(checked(Beat, said | {"age_seconds": round(max(0.0, age), 1)}))
    return beats


def odd_ranks(beats: list[Beat], size: int, attempt: int, every_seconds: float) -> str:
    """Which of `size` ranks differ from the rest, as a sentence: silent ones first, then those in another step or phase."""
    present = {beat.rank: beat for beat in beats if beat.attempt == attempt}
    if missing := sorted(set(range(size)) - set(present)):
        return f"never heard of in this attempt: {_ranks(missing)}"
    silent = [b for b in present.values() if b.age_seconds > _SILENT_BEATS * every_seconds]
    if silent:
        told = ", ".join(f"{_who(b)} (silent for {b.age_seconds:.0f} s, last in {_where(b)})" for b in silent)
        return f"stopped, dead or cut off: {told}"
    places = Counter((beat.step, beat.phase) for beat in present.values())
    if len(places) == 1:
        step, phase = next(iter(places))
        return f"all {size} ranks are in phase {phase} after step {step}: the network between them, or one collective"
    usual = places.most_common(1)[0][0]
    # Equally many in two places: those that are behind keep the others waiting.
    if list(places.values()).count(places[usual]) > 1:
        usual = max(place for place, count in places.items() if count == places[usual])
    odd = [beat for beat in present.values() if (beat.step, beat.phase) != usual]
    told = ", ".join(f"{_who(b)} is in {_where(b)}" for b in odd)
    return f"{told}, while the others are in phase {usual[1]} after step {usual[0]}"


def silent_hosts(beats: list[Beat], every_seconds: float) -> list[str]:
    """Hosts of which every rank is silent while some other host is not: candidates to be left out of a requeue."""
    quiet = {b.host for b in beats if b.age_seconds > _SILENT_BEATS * every_seconds}
    loud = {b.host for b in beats if b.age_seconds <= _SILENT_BEATS * every_seconds}
    return sorted(quiet - loud) if loud else []


def _file(folder: Path, rank: int) -> Path:
    return folder / _FOLDER / f"rank_{rank:05d}.json"


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} (process {beat.pid})"


def _where(beat: Beat) -> str:
    return f"phase {beat.phase} after step {beat.step}"


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
