"""The loop: when to fetch, step, log, draw, save and stop. What a step means is the stage's business."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.training_data import Budget, next_for_all
from ldmscale.distributed.collectives import any_true_of, gather_lists, set_collective_timeout
from ldmscale.distributed.preemption import StopFlag
from ldmscale.distributed.watchdog import Heartbeat
from ldmscale.errors import DataError, LdmscaleError
from ldmscale.tracking.metrics import MetricSums
from ldmscale.tracking.throughput import Throughput
from ldmscale.tracking.tracker import Tracker
from ldmscale.train.dry_run import rehearse
from ldmscale.train.snapshot import HostCopies, restore, snapshot, snapshot_averages, summary, verify
from ldmscale.train.stage import Batch, Stage
from ldmscale.train.straggler import Pacer
from ldmscale.train.update_guard import Guard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """When things happen, in optimiser steps; 0 means never."""

    max_steps: int
    accumulation_steps: int
    log_every_steps: int
    save_every_steps: int
    ephemeral_every_steps: int
    picture_every_steps: int
    validate_every_steps: int
    generate_every_steps: int
    average_every_steps: int  # power-function averages are stored
    garbage_every_steps: int
    dry_run: bool = False  # one forward and backward that leaves nothing behind, before the first step
    step_timeout_seconds: float | None = None  # of collectives, once the first step is done


class Trainer:
    """Runs one stage from its newest checkpoint to `max_steps`, or to a signal. Every rank runs the same loop.

    `loader_from` makes the loader that starts at a position (and, with buckets, at what each has given) of the data
    and the order that `data_fingerprint` names; `budget` says how much of them may be bad;
    `about` goes into every checkpoint's manifest, `probe_batch` gives the batch of one sample that its answer is for;
    `learning_rates` gives each network's rate as a function of the finished steps.
    """

    def __init__(
        self,
        stage: Stage,
        loader_from: Callable[[int, Sequence[int] | None], Loader],
        data_fingerprint: str,
        budget: Budget,
        about: Mapping[str, Any],
        probe_batch: Callable[[], Batch],
        schedule: Schedule,
        learning_rates: Mapping[str, Callable[[int], float]],
        checkpoints: CheckpointManager,
        stored_averages: CheckpointManager,
        guard: Guard,
        tracker: Tracker,
        throughput: Throughput,
        stop: StopFlag,
        heartbeat: Heartbeat,
        pacer: Pacer,
    ) -> None:
        self.stage, self.schedule = stage, schedule
        self.learning_rates = learning_rates
        self.checkpoints, self.stored_averages = checkpoints, stored_averages
        self.guard = guard
        self.tracker, self.throughput, self.stop = tracker, throughput, stop
        self.heartbeat, self.pacer = heartbeat, pacer
        self.step = 0  # optimiser steps done
        self.finished_step: int | None = None  # at which the stage has made its last measurements
        self.position = 0
        self.consumed: Sequence[int] | None = None  # of the position, by bucket
        self.budget = budget
        self._saved_step = 0
        self._copies = HostCopies()
        self._measured: dict[str, float] = {}  # since the last save
        self._ahead: Batch | None = None  # fetched and not yet trained on
        self._loader_from, self._data_fingerprint = loader_from, data_fingerprint
        self._about, self._probe_batch = about, probe_batch
        self._probed: Batch | None = None

    def resume(self) -> bool:
        """Go back to the newest complete checkpoint; returns whether there is one."""
        newest = self.checkpoints.newest()
        self.stored_averages.settle()
        if newest is not None:
            self._restore(newest)
            log.info("resumed from %s: step %d, %d images seen", newest, self.step, self.position)
        self.tracker.resume_from(self.step)
        return newest is not None

    def _restore(self, checkpoint: Path) -> None:
        state = restore(checkpoint, self.stage.engines, self.stage.averages)
        if state["data"] != self._data_fingerprint:
            raise DataError(
                f"the shards or their order are not those that {checkpoint} was trained on (shards were added, removed or "
                "changed, or the seed, weights, filters, buckets or data.shuffle_block_shards): give those of before, or "
                f"another run.name to start a new run (then: {state['data']}; now: {self._data_fingerprint})"
            )
        self.step = int(state["step"])
        self.finished_step = self.step if state["finished"] else None
        self.position, self.consumed = int(state["position"]), state.get("consumed")
        self.stage.restore(state["stage"])
        self._saved_step = self.step
        verify(state["answer"], self._answer(), self._precision, checkpoint)
        self.guard = self.guard.restored(state.get("safety", {}))

    def fit(self) -> bool:
        """Train. Returns whether `max_steps` was reached; False: a signal came, and all is saved."""
        sums, shortened, postponed = MetricSums(), False, False
        loader = self._loader_from(self.position, self.consumed)
        # Python's collector runs on all ranks at the same steps, or some rank always keeps the others waiting.
        gc.collect()
        gc.disable()
        try:
            if self.schedule.dry_run and self.step < self.schedule.max_steps:
                self._ahead = next_for_all(loader, self.budget)
                rehearse(self.stage, self._ahead, self.schedule.max_steps)
            while self.step < self.schedule.max_steps:
                self._one_step(loader, sums)
                if self.schedule.step_timeout_seconds is not None and not shortened:
                    set_collective_timeout(self.schedule.step_timeout_seconds)
                    shortened = True
                if self.guard.must_go_back:
                    self._go_back()
                    sums = MetricSums()
                    continue
                last = self.step == self.schedule.max_steps
                stopping, saving, uploading, storing = any_true_of(
                    self.stop.requested, *self.checkpoints.busy, self.stored_averages.busy[0]
                )
                self.stored_averages.advance(storing)
                # Not before: a run that goes on from a checkpoint has all averages that were stored until then.
                self.checkpoints.advance(saving or self.stored_averages.saving is not None, uploading)
                if self._due(self.schedule.log_every_steps) or last or stopping:
                    self._log(sums)
                else:
                    self.tracker.advance(self.step)
                if self._due(self.schedule.picture_every_steps) and not stopping:
                    self._draw()
                if self._due(self.schedule.validate_every_steps) and not stopping:
                    self._measure("validation", self.stage.validate)
                if self._due(self.schedule.generate_every_steps) and not stopping:
                    self._measure("generation", self.stage.generate)
                if self._due(self.schedule.average_every_steps):
                    self._store_averages()
                if self._due(self.schedule.garbage_every_steps):
                    gc.collect()
                # Also before `finish`, which may take long or fail: nothing trained is ever lost to it.
                lasting = last or self._due(self.schedule.save_every_steps)
                if lasting or stopping or postponed or self._due(self.schedule.ephemeral_every_steps):
                    # A checkpoint to go back to must not lie among steps that were skipped.
                    postponed = self.guard.skipped_in_a_row > 0 and not (last or stopping)
                    if not postponed:
                        self._save(ephemeral=not lasting)
                if stopping:
                    self._tell_why()
                    self._finish_saves()
                    return False
            self._finish_saves()
        except LdmscaleError as error:
            if error.shared:  # all ranks are here, and no network has moved since the last whole step
                self._save_before_stopping()
            raise
        finally:
            gc.enable()
            loader.close()
        return True

    def dry_run(self) -> None:
        """Forward and backward of one micro-batch, and the end."""
        loader = self._loader_from(self.position, self.consumed)
        try:
            rehearse(self.stage, next(loader), self.schedule.max_steps)
        finally:
            loader.close()

    def finish(self) -> None:
        """What comes after the last step: the stage's own measurements, last pictures, last save."""
        if self.finished_step == self.step:
            return  # it had ended before, and only its note of that was lost
        with self._aside("finish"):
            measured = self.stage.finish()
        if measured:
            self.tracker.log(self.step, {"images_seen": self.position, **measured})
        if self.schedule.picture_every_steps and not self._due(self.schedule.picture_every_steps):
            self._draw()
        if self.schedule.validate_every_steps and not self._due(self.schedule.validate_every_steps):
            self._measure("validation", self.stage.validate)
        if self.schedule.generate_every_steps and not self._due(self.schedule.generate_every_steps):
            self._measure("generation", self.stage.generate)
        self.finished_step = self.step
        self._save()
        self.checkpoints.finish(must_hold=True, uploads=True)

    def _save_before_stopping(self) -> None:
        if self.step > self._saved_step:
            self._save()
        self._finish_saves()

    def _finish_saves(self) -> None:
        try:
            self.stored_averages.finish(must_hold=True)
        finally:
            self.checkpoints.finish(must_hold=True)

    def _one_step(self, loader: Loader, sums: MetricSums) -> None:
        active = self.stage.active(self.step)
        waited = loader.wait_seconds
        for name in active:
            self.stage.engines[name].set_learning_rate(self.learning_rates[name](self.step))
        measured, updated = [], set[str]()
        for number in range(1, self.schedule.accumulation_steps + 1):
            self.heartbeat.enter("data", self.step)
            batch = self._ahead if self._ahead is not None else next_for_all(loader, self.budget)
            self._ahead = None
            self.heartbeat.enter("step", self.step)
            metrics = self.stage.micro_step(batch, self.step)
            measured.append(metrics)
            loss = metrics["loss/total"]
            assert isinstance(loss, Tensor)
            self.guard.note(batch["key"], loss)
            discard = number == self.schedule.accumulation_steps and self.guard.spiking(self.step)
            for name in active:
                if self.stage.engines[name].step(discard=discard):
                    updated.add(name)
                    for average in self.stage.averages.get(name, ()):
                        average.update()
        for name in active:
            # Named after the network only where there are several.
            prefix, engine = "" if len(self.stage.engines) == 1 else f"{name}/", self.stage.engines[name]
            if name in updated:
                sums.add({f"{prefix}gradient_norm": engine.gradient_norm()})
            if engine.skipped_updates:  # windows without a finite gradient, since the run began
                sums.add({f"{prefix}skipped_updates": float(engine.skipped_updates)})
        self.step += 1
        if left := [name for name in active if name not in updated]:
            self.guard.skipped(self.step, range(self.position, loader.position), left)
        else:
            self.guard.updated(self.step)
            for metrics in measured:
                sums.add(metrics)
        self.throughput.step(loader.position - self.position, loader.wait_seconds - waited)
        self.position, self.consumed = loader.position, loader.consumed

    def _go_back(self) -> None:
        """To the newest checkpoint's weights, and on with the data behind the steps that were skipped."""
        self.guard.check_further_return(self.step)
        self.stored_averages.finish()
        self.checkpoints.finish()
        # One among skipped steps, written because the run was stopped there, is the second choice.
        newest = self.checkpoints.newest(Guard.was_calm) or self.checkpoints.newest()
        if newest is None:
            raise LdmscaleError(
                f"step {self.step}: {self.guard.skipped_in_a_row} updates in a row were skipped, and there is no "
                f"checkpoint to go back to; {self.guard.file} names the samples. Lower optim.lr, or look at the data"
            )
        before, position, consumed = self.guard, self.position, self.consumed
        self._restore(newest)
        left_out = range(self.position, position)
        self.position, self.consumed = position, consumed
        self.guard.went_back(before, self.step, left_out)
        self.tracker.resume_from(self.step)
        self._save()  # a resume must know which samples are left out

    def _log(self, sums: MetricSums) -> None:
        rates = {
            ("lr" if len(self.learning_rates) == 1 else f"{name}/lr"): rate(self.step - 1)
            for name, rate in self.learning_rates.items()
        }
        means = sums.mean()
        self._measured |= {key: value for key, value in means.items() if math.isfinite(value)}
        pace = self.throughput.report()
        ranks = self.pacer.compare(pace.get("time/data_wait_share", 0.0))
        self.tracker.log(self.step, {"images_seen": self.position, **means, **rates, **pace, **ranks})

    def _draw(self) -> None:
        with self._aside("pictures"):
            for picture in self.stage.pictures():
                self.tracker.images(self.step, picture.name, picture.pixels, picture.captions)

    def _measure(self, name: str, measure: Callable[[], dict[str, float]]) -> None:
        with self._aside(name):
            if found := measure():
                values = {f"{name}/{key}": value for key, value in found.items()}
                self._measured |= values
                self.tracker.log(self.step, {"images_seen": self.position, **values})

    def _save(self, *, ephemeral: bool = False) -> None:
        """Start a save: the training waits for the copy to host memory, and for the save before if it still runs."""
        with self._aside("save"):
            begun = time.perf_counter()
            if self.stored_averages.saving != self.step:
                self.stored_averages.finish()
            self.checkpoints.finish()  # its pieces are in the memory that the new copy goes to
            state: dict[str, Any] = {
                "step": self.step,
                "position": self.position,
                "consumed": None if self.consumed is None else list(self.consumed),
                "images_seen": self.position,
                "data": self._data_fingerprint,
                "finished": self.finished_step == self.step,
                "ephemeral": ephemeral,
                "metrics": self._measured,
                "stage": self.stage.state(),
                "safety": self.guard.state(),
                "answer": self._answer(),
                "run": self._about,
            }
            pieces, description = snapshot(self.stage.engines, self.stage.averages, self._copies)
            self.checkpoints.begin(self.step, pieces, description | state)
            self._measured = {}
            self._saved_step = self.step
        log.info("saving step %d; the training waited %.2f s", self.step, time.perf_counter() - begun)

    def _answer(self) -> list[float]:
        """Of the main network to a fixed input: the run's first sample."""
        if self._probed is None:
            self._probed = self._probe_batch()
        return summary(self.stage.answer(self._probed))

    @property
    def _precision(self) -> str:
        return next(iter(self.stage.engines.values())).options.precision

    def _store_averages(self) -> None:
        with self._aside("save"):
            pieces, description = snapshot_averages(self.stage.engines, self.stage.averages)
            self.stored_averages.begin(self.step, pieces, description | {"images_seen": self.position})

    @contextmanager
    def _aside(self, phase: str) -> Iterator[None]:
        """What is no training: it counts for no throughput, and is a phase of its own."""
        with self.throughput.paused(), self.heartbeat.within(phase):
            yield

    def _tell_why(self) -> None:
        reasons = gather_lists([self.stop.reason])
        told = [f"{reason} (rank {rank})" for rank, reason in enumerate(reasons) if reason is not None]
        log.info("stopping after step %d: %s", self.step, ", ".join(told))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0
