"""The trainer of the two training jobs, built from the configuration and run to its end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch

from ldmscale.checkpoint.folders import Retention
from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.recovery import BESIDE
from ldmscale.checkpoint.run_folder import about_run
from ldmscale.config import DiffusionJob, TrainingJob
from ldmscale.config.typed import plain
from ldmscale.data.loading.training_data import TrainingData
from ldmscale.distributed import flight_recorder
from ldmscale.distributed.collectives import barrier, from_main_rank
from ldmscale.distributed.preemption import EXIT_STOPPED, StopFlag
from ldmscale.distributed.watchdog import Heartbeat
from ldmscale.errors import ConfigError, DataError
from ldmscale.setup.index import storage_of
from ldmscale.setup.run import Run
from ldmscale.setup.warm_start import begin_with
from ldmscale.tracking.throughput import Throughput, peak_flops
from ldmscale.tracking.tracker import Tracker
from ldmscale.train.engine.process import disconnect
from ldmscale.train.run_checkpoints import RunCheckpoints
from ldmscale.train.stage import Stage
from ldmscale.train.straggler import StragglerDetector
from ldmscale.train.trainer import Monitors, Schedule, Trainer
from ldmscale.train.update_guard import Guard

log = logging.getLogger(__name__)

_KEPT_FAULTS = 8


def train(
    run: Run,
    config: TrainingJob,
    stage: Stage,
    data: TrainingData,
    *,
    learning_rates: Mapping[str, Callable[[int], float]],
    stop: StopFlag,
    flops_per_image: float | None,
) -> int:
    """Run the trainer to its end and return the exit status."""
    monitors = _monitors(run, config, flops_per_image)
    trainer = Trainer(
        stage,
        data,
        schedule=_schedule(run, config),
        learning_rates=learning_rates,
        checkpoints=_checkpoints(run, config),
        guard=Guard(config.safety, run.folder.skipped_steps),
        monitors=monitors,
        stop=stop,
    )
    status: Literal["finished", "stopped", "failed"] = "failed"
    try:
        if not trainer.resume():
            begin_with(config.warm_start, stage)
        if config.safety.dry_run == "only":
            trainer.dry_run()
            status = "finished"
        elif trainer.fit():
            trainer.finish()
            if run.ranks.is_main:
                run.fence()
                run.folder.note({**run.folder.identity(), "finished_step": trainer.step})
            status = "finished"
        else:
            status = "stopped"
    except (ConfigError, DataError) as error:
        run.note("fault", list(error.faults[:_KEPT_FAULTS]))  # `doctor run.dir` shows it
        raise
    finally:
        monitors.heartbeat.close()
        monitors.tracker.close(status)
        for lease in run.lease:
            lease.release()
    barrier()
    disconnect()
    return 0 if status == "finished" else EXIT_STOPPED


def _schedule(run: Run, config: TrainingJob) -> Schedule:
    return Schedule(
        train=config.train,
        checkpoint=config.checkpoint,
        safety=config.safety,
        accumulation_steps=run.accumulation_steps,
        sample_every_steps=config.preview.every_steps,
        validate_every_steps=config.validation.every_steps,
        generate_every_steps=config.generation.every_steps if isinstance(config, DiffusionJob) else 0,
        average_every_steps=config.ema.store_every_steps,
    )


def _monitors(run: Run, config: TrainingJob, flops_per_image: float | None) -> Monitors:
    def open_tracker() -> Tracker:
        return Tracker(
            run.folder.path,
            run.ranks,
            config.tracking,
            config.train.max_steps,
            name=config.run.name,
            run_id=run.identity["wandb_id"],
            config=plain(config),
            fence=run.fence,
        )

    opened: list[Tracker] = []
    # W&B may fail on rank 0, and all ranks must know.
    from_main_rank(lambda: opened.append(open_tracker()))
    tracker = opened[0] if opened else open_tracker()
    heartbeat = Heartbeat(
        run.folder.path,
        run.ranks,
        attempt=run.identity["attempts"],
        every_seconds=config.safety.heartbeat_seconds,
        # Below the timeout of the collectives, which cannot name the rank that kept them waiting.
        first_timeout_seconds=0.8 * 60 * config.safety.first_step_timeout_minutes,
        timeout_seconds=0.8 * 60 * config.safety.step_timeout_minutes,
        before_end=partial(flight_recorder.dump, run.folder.path / "logs", run.ranks.rank),
    )
    throughput = Throughput(
        run.device,
        ranks=run.ranks.size,
        flops_per_image=flops_per_image,
        device_peak_flops=_peak_flops(run, config) if flops_per_image else None,
    )
    stragglers = StragglerDetector(run.ranks, run.device)
    return Monitors(tracker=tracker, throughput=throughput, heartbeat=heartbeat, stragglers=stragglers)


def _peak_flops(run: Run, config: TrainingJob) -> float | None:
    """The device's peak by which MFU is measured: as configured, or as its maker states it."""
    if config.tracking.peak_tflops is not None:
        return 1e12 * float(config.tracking.peak_tflops)
    peak = peak_flops(run.device, config.train.precision)
    if peak is None and run.device.type == "cuda":
        log.info(
            "throughput/mfu is not measured: the peak of %s in %s is not known; tracking.peak_tflops=N states it (dense, without "
            "sparsity)", torch.cuda.get_device_name(run.device), config.train.precision,
        )  # fmt: skip
    return peak


def _checkpoints(run: Run, config: TrainingJob) -> RunCheckpoints:
    states = CheckpointManager(
        run.folder.checkpoints,
        retention=config.checkpoint,
        max_failed_saves=config.checkpoint.max_failed_saves,
        attempt=run.identity["attempts"],
        fence=run.fence,
        url=config.checkpoint.url,
        beside=BESIDE,
        storage=storage_of(config.data),
    )
    averages = CheckpointManager(
        run.folder.averages,
        retention=Retention(keep_last=sys.maxsize),
        max_failed_saves=config.checkpoint.max_failed_saves,
        attempt=run.identity["attempts"],
        fence=run.fence,
    )
    return RunCheckpoints(states=states, averages=averages, about=about_run(plain(config), run.identity))
