"""The training loop: fetches batches, steps the stage, logs, samples images, saves and stops. A stage defines the step."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ldmscale.checkpoint.shards import state_of
from ldmscale.data.loading.training_data import TrainingData
from ldmscale.distributed.collectives import any_true_of, gather_lists, set_collective_timeout
from ldmscale.distributed.preemption import StopFlag
from ldmscale.distributed.watchdog import Heartbeat
from ldmscale.errors import DataError, LdmscaleError
from ldmscale.tracking.metrics import Metric, MetricSums
from ldmscale.tracking.throughput import Throughput
from ldmscale.tracking.tracker import Tracker
from ldmscale.train.dry_run import rehearse
from ldmscale.train.run_checkpoints import RunCheckpoints
from ldmscale.train.snapshot import restore, summary, verify
from ldmscale.train.stage import Batch, Stage
from ldmscale.train.straggler import StragglerDetector
from ldmscale.train.update_guard import Guard

log = logging.getLogger(__name__)


class LoopOptions(Protocol):
    """The `train` section of the configuration, as far as the loop reads it."""

    @property
    def max_steps(self) -> int: ...
    @property
    def log_every_steps(self) -> int: ...
    @property
    def garbage_every_steps(self) -> int: ...


class SaveOptions(Protocol):
    """The `checkpoint` section, as far as the loop reads it."""

    @property
    def save_every_steps(self) -> int: ...
    @property
    def ephemeral_every_steps(self) -> int: ...


class StartOptions(Protocol):
    """The `safety` section, as far as the loop reads it."""

    @property
    def dry_run(self) -> bool | Literal["only"]: ...
    @property
    def step_timeout_minutes(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things happen, in optimiser steps; 0 means never.

    Attributes:
        train, checkpoint, safety: sections of the configuration.
        accumulation_steps: micro-batches per step on one rank.
        sample_every_steps: images are sampled for the tracker.
        validate_every_steps: the stage validates.
        generate_every_steps: the stage measures generated images.
        average_every_steps: power-function averages are stored.
    """

    train: LoopOptions
    checkpoint: SaveOptions
    safety: StartOptions
    accumulation_steps: int
    sample_every_steps: int
    validate_every_steps: int
    generate_every_steps: int
    average_every_steps: int

    @property
    def max_steps(self) -> int:
        return self.train.max_steps


@dataclass(frozen=True, kw_only=True)
class Monitors:
    """What watches the loop and reports on it."""

    tracker: Tracker
    throughput: Throughput
    heartbeat: Heartbeat
    stragglers: StragglerDetector


class Trainer:
    """Runs one stage from its newest checkpoint to `max_steps`, or to a signal. Every rank runs the same loop.

    `learning_rates` gives each network's learning rate as a function of the number of finished steps.
    """

    def __init__(
        self,
        stage: Stage,
        data: TrainingData,
        *,
        schedule: Schedule,
        learning_rates: Mapping[str, Callable[[int], float]],
        checkpoints: RunCheckpoints,
        guard: Guard,
        monitors: Monitors,
        stop: StopFlag,
    ) -> None:
        self.stage, self.data, self.schedule = stage, data, schedule
        self.learning_rates = learning_rates
        self.checkpoints, self.guard, self.stop = checkpoints, guard, stop
        self.tracker, self.throughput = monitors.tracker, monitors.throughput
        self.heartbeat, self.stragglers = monitors.heartbeat, monitors.stragglers
        self.step = 0  # finished optimiser steps
        self.finished_step: int | None = None  # the step after which `finish` has run
        self.position = 0  # in the data, after `step`
        self.consumed: Sequence[int] | None = None  # the same by bucket
        self._saved_step = 0
        self._measured: dict[str, float] = {}  # since the last save
        self._prefetched: Batch | None = None
        self._first_sample: Batch | None = None

    def resume(self) -> bool:
        """Restore the newest complete checkpoint; returns whether there is one."""
        newest = self.checkpoints.newest()
        if newest is not None:
            self._restore(newest)
            log.info("resumed from %s: step %d, %d images seen", newest, self.step, self.position)
        self.tracker.resume_from(self.step)
        return newest is not None

    def _restore(self, checkpoint: Path) -> None:
        with state_of(checkpoint):
            state = restore(checkpoint, self.stage.engines, self.stage.averages)
            if state["data"] != self.data.fingerprint:
                raise DataError(
                    f"the shards or their order are not those that {checkpoint} was trained on (shards were added, removed or "
                    "changed, or the seed, weights, filters, buckets or data.shuffle_block_shards): give those of before, or "
                    f"another run.name to start a new run (then: {state['data']}; now: {self.data.fingerprint})"
                )
            self.step = int(state["step"])
            self.finished_step = self.step if state["finished"] else None
            self.position, self.consumed = int(state["position"]), state.get("consumed")
            self.stage.restore(state["stage"])
            self._saved_step = self.step
            verify(state["answer"], self._answer(), self._precision, checkpoint)
            self.guard.restore(state.get("safety", {}))

    def fit(self) -> bool:
        """Train. Returns True at `max_steps`, False after a stop request; everything is saved then."""
        sums, shortened, postponed = MetricSums(), False, False
        self.data.start(self.position, self.consumed)
        # All ranks run Python's collector at the same steps; otherwise some rank always keeps the others waiting.
        gc.collect()
        gc.disable()
        try:
            if self.schedule.safety.dry_run and self.step < self.schedule.max_steps:
                self._prefetched = self.data.next_batch()
                rehearse(self.stage, self._prefetched, self.schedule.max_steps)
            while self.step < self.schedule.max_steps:
                self._one_step(sums)
                if not shortened:
                    set_collective_timeout(60 * self.schedule.safety.step_timeout_minutes)
                    shortened = True
                if self.guard.must_roll_back:
                    self._roll_back()
                    sums = MetricSums()
                    continue
                last = self.step == self.schedule.max_steps
                stopping, *busy = any_true_of(self.stop.requested, *self.checkpoints.busy)
                self.checkpoints.advance(*busy)
                if self._due(self.schedule.train.log_every_steps) or last or stopping:
                    self._log(sums)
                else:
                    self.tracker.advance(self.step)
                if not stopping:
                    self._measure()
                if self._due(self.schedule.average_every_steps):
                    self._store_averages()
                if self._due(self.schedule.train.garbage_every_steps):
                    gc.collect()
                # Also before `finish`, which may take long or fail: no training is lost to it.
                lasting = last or self._due(self.schedule.checkpoint.save_every_steps)
                ephemeral = self._due(self.schedule.checkpoint.ephemeral_every_steps)
                if lasting or stopping or postponed or ephemeral:
                    # A checkpoint to roll back to must not lie among steps that were skipped.
                    postponed = self.guard.skipped_in_a_row > 0 and not (last or stopping)
                    if not postponed:
                        self._save(ephemeral=not lasting)
                if stopping:
                    self._log_stop_reasons()
                    self.checkpoints.wait()
                    return False
            self.checkpoints.wait()
        except LdmscaleError as error:
            if error.shared:  # all ranks are here, and no network has changed since the last whole step
                self._save_before_stopping()
            raise
        finally:
            gc.enable()
            self.data.close()
        return True

    def dry_run(self) -> None:
        """Forward and backward of one micro-batch, and nothing else."""
        self.data.start(self.position, self.consumed)
        try:
            rehearse(self.stage, self.data.next_batch(), self.schedule.max_steps)
        finally:
            self.data.close()

    def finish(self) -> None:
        """After the last step: the stage's own measurements, the last images and metrics, the last save."""
        if self.finished_step == self.step:
            return  # an earlier start has finished, and only its note in run.json was lost
        with self._paused("finish"):
            measured = self.stage.finish()
        if measured:
            self.tracker.log(self.step, {"images_seen": self.position, **measured})
        self._measure(remaining=True)
        self.finished_step = self.step
        self._save()
        self.checkpoints.wait(uploads=True)

    def _save_before_stopping(self) -> None:
        """Save the last whole step; gradients of micro-batches after it are lost with the process."""
        if self.step > self._saved_step:
            self._save(inside_window=True)
        self.checkpoints.wait()

    def _one_step(self, sums: MetricSums) -> None:
        active = self.stage.active(self.step)
        waited = self.data.wait_seconds
        for name in active:
            self.stage.engines[name].set_learning_rate(self.learning_rates[name](self.step))
        measured, updated = self._accumulate(active)
        for name in active:
            # Named after the network only where there are several.
            prefix, engine = "" if len(self.stage.engines) == 1 else f"{name}/", self.stage.engines[name]
            if name in updated:
                sums.add({f"{prefix}gradient_norm": engine.gradient_norm()})
            if engine.skipped_updates:  # windows without a finite gradient, since the run began
                sums.add({f"{prefix}skipped_updates": float(engine.skipped_updates)})
        self.step += 1
        if skipped := [name for name in active if name not in updated]:
            self.guard.on_skip(self.step, range(self.position, self.data.position), skipped)
        else:
            self.guard.on_update(self.step)
            for metrics in measured:
                sums.add(metrics)
        self.throughput.step(self.data.position - self.position, self.data.wait_seconds - waited)
        self.position, self.consumed = self.data.position, self.data.consumed

    def _accumulate(self, active: Sequence[str]) -> tuple[list[Mapping[str, Metric]], set[str]]:
        """The micro-batches of one step and its update; returns their metrics and the networks that were updated."""
        measured: list[Mapping[str, Metric]] = []
        updated: set[str] = set()
        for number in range(1, self.schedule.accumulation_steps + 1):
            self.heartbeat.enter("data", self.step)
            batch = self._prefetched if self._prefetched is not None else self.data.next_batch()
            self._prefetched = None
            self.heartbeat.enter("step", self.step)
            loss, metrics = self.stage.micro_step(batch, self.step)
            measured.append({"loss/total": loss, **metrics})
            self.guard.record(batch["key"], loss)
            discard = number == self.schedule.accumulation_steps and self.guard.should_skip(self.step)
            for name in active:
                if self.stage.engines[name].step(discard=discard):
                    updated.add(name)
                    for average in self.stage.averages.get(name, ()):
                        average.update()
        return measured, updated

    def _roll_back(self) -> None:
        """Restore the newest checkpoint's weights, and continue with the data after the skipped steps."""
        self.guard.check_rollback_limit(self.step)
        # A checkpoint among skipped steps, written because the run was stopped there, is the second choice.
        newest = self.checkpoints.newest_clean(Guard.is_clean)
        if newest is None:
            raise LdmscaleError(
                f"step {self.step}: {self.guard.skipped_in_a_row} updates in a row were skipped, and there is no "
                f"checkpoint to go back to; {self.guard.file} names the samples. Lower optim.lr, or look at the data"
            )
        before, position, consumed = self.guard.state(), self.position, self.consumed
        self._restore(newest)
        left_out = range(self.position, position)
        self.position, self.consumed = position, consumed
        self.guard.on_rollback(before, self.step, left_out)
        self.tracker.resume_from(self.step)
        self._save()  # a resume must know which samples are left out

    def _log(self, sums: MetricSums) -> None:
        rates = {
            ("lr" if len(self.learning_rates) == 1 else f"{name}/lr"): rate(self.step - 1)
            for name, rate in self.learning_rates.items()
        }
        means = sums.mean()
        self._measured |= {key: value for key, value in means.items() if math.isfinite(value)}
        speed = self.throughput.report()
        ranks = self.stragglers.compare(speed.get("time/data_wait_share", 0.0))
        self.tracker.log(self.step, {"images_seen": self.position, **means, **rates, **speed, **ranks})

    def _measure(self, *, remaining: bool = False) -> None:
        """Sample images, validate and generate where this step is due; `remaining`: where it is not."""
        actions = (
            (self.schedule.sample_every_steps, self._sample_images),
            (
                self.schedule.validate_every_steps,
                lambda: self._log_measured("validation", self.stage.validate),
            ),
            (
                self.schedule.generate_every_steps,
                lambda: self._log_measured("generation", self.stage.generate),
            ),
        )
        for every, act in actions:
            if every and self._due(every) is not remaining:
                act()

    def _sample_images(self) -> None:
        with self._paused("pictures"):
            for picture in self.stage.pictures():
                self.tracker.images(self.step, picture.name, picture.pixels, picture.captions)

    def _log_measured(self, name: str, measure: Callable[[], dict[str, float]]) -> None:
        with self._paused(name):
            if found := measure():
                values = {f"{name}/{key}": value for key, value in found.items()}
                self._measured |= values
                self.tracker.log(self.step, {"images_seen": self.position, **values})

    def _save(self, *, ephemeral: bool = False, inside_window: bool = False) -> None:
        """Start a checkpoint."""
        with self._paused("save"):
            begun = time.perf_counter()
            state: dict[str, Any] = {
                "step": self.step,
                "position": self.position,
                "consumed": None if self.consumed is None else list(self.consumed),
                "images_seen": self.position,
                "data": self.data.fingerprint,
                "finished": self.finished_step == self.step,
                "ephemeral": ephemeral,
                "metrics": self._measured,
                "stage": self.stage.state(),
                "safety": self.guard.state(),
                "answer": self._answer(),
            }
            self.checkpoints.save(self.step, self.stage, state, inside_window=inside_window)
            self._measured = {}
            self._saved_step = self.step
        log.info("saving step %d; the training waited %.2f s", self.step, time.perf_counter() - begun)

    def _answer(self) -> list[float]:
        """A summary of the main network's output for a fixed input; a restored checkpoint must reproduce it."""
        if self._first_sample is None:
            self._first_sample = self.data.first_sample()
        return summary(self.stage.answer(self._first_sample))

    @property
    def _precision(self) -> str:
        return next(iter(self.stage.engines.values())).options.precision

    def _store_averages(self) -> None:
        with self._paused("save"):
            self.checkpoints.store_averages(self.step, self.stage, self.position)

    @contextmanager
    def _paused(self, phase: str) -> Iterator[None]:
        """Time spent here is excluded from throughput and reported as a separate phase."""
        with self.throughput.paused(), self.heartbeat.within(phase):
            yield

    def _log_stop_reasons(self) -> None:
        reasons = gather_lists([self.stop.reason])
        found = [f"{reason} (rank {rank})" for rank, reason in enumerate(reasons) if reason is not None]
        log.info("stopping after step %d: %s", self.step, ", ".join(found))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0
