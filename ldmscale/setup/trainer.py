"""What the two training jobs share: the trainer from its parts, run to its end, with an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ldmscale.checkpoint.folders import Retention
from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.recovery import BESIDE
from ldmscale.checkpoint.run_folder import about_run
from ldmscale.config import CheckpointConfig, DiffusionJob, SafetyConfig, TrainingJob
from ldmscale.config.typed import plain
from ldmscale.data.loading.loader import MakeItem
from ldmscale.data.loading.training_data import Budget
from ldmscale.distributed.collectives import barrier
from ldmscale.distributed.preemption import EXIT_STOPPED, StopFlag
from ldmscale.distributed.watchdog import Heartbeat
from ldmscale.setup.dataloaders import first_sample, make_loader
from ldmscale.setup.index import storage_of
from ldmscale.setup.run import Run
from ldmscale.setup.warm_start import begin_with
from ldmscale.storage.object_store import Storage
from ldmscale.tracking.throughput import Throughput, peak_flops
from ldmscale.tracking.tracker import Tracker
from ldmscale.train.engine.process import disconnect
from ldmscale.train.stage import Stage
from ldmscale.train.straggler import Pacer
from ldmscale.train.trainer import Schedule, Trainer
from ldmscale.train.update_guard import Guard, SafetyOptions


def train(
    run: Run,
    config: TrainingJob,
    stage: Stage,
    reader: MakeItem,
    rates: Mapping[str, Callable[[int], float]],
    stop: StopFlag,
    flops_per_image: float | None,
) -> int:
    """Run the trainer to its end and return the exit status."""
    tracker = Tracker(
        run.folder.path,
        run.ranks,
        config.tracking,
        config.train.max_steps,
        name=config.run.name,
        run_id=run.identity["wandb_id"],
        config=plain(config),
        fence=run.fence,
    )
    safety = config.safety
    heartbeat = Heartbeat(
        run.folder.path,
        run.ranks,
        attempt=run.identity["attempts"],
        every_seconds=safety.heartbeat_seconds,
        # Before the collectives themselves give up: they cannot say who kept them waiting.
        first_timeout_seconds=0.8 * 60 * safety.first_step_timeout_minutes,
        timeout_seconds=0.8 * 60 * safety.step_timeout_minutes,
    )
    trainer = Trainer(
        stage,
        lambda position, consumed: make_loader(run, config, reader, position, consumed),
        f"{run.index.fingerprint}, seed {config.seed}, blocks of {config.data.shuffle_block_shards}",
        Budget(config.data.max_bad_share, config.data.max_bad_in_a_row),
        about_run(plain(config), run.identity),
        lambda: first_sample(run, reader),
        Schedule(
            max_steps=config.train.max_steps,
            accumulation_steps=run.accumulation_steps,
            log_every_steps=config.train.log_every_steps,
            save_every_steps=config.checkpoint.save_every_steps,
            ephemeral_every_steps=config.checkpoint.ephemeral_every_steps,
            picture_every_steps=config.preview.every_steps,
            validate_every_steps=config.validation.every_steps,
            generate_every_steps=config.generation.every_steps if isinstance(config, DiffusionJob) else 0,
            average_every_steps=config.ema.store_every_steps,
            garbage_every_steps=config.train.garbage_every_steps,
            dry_run=config.safety.dry_run is True,
            step_timeout_seconds=60 * config.safety.step_timeout_minutes,
        ),
        rates,
        _checkpoints(run, config.checkpoint, storage_of(config.data)),
        CheckpointManager(
            run.folder.averages,
            retention=Retention(keep_last=sys.maxsize),
            max_failed_saves=config.checkpoint.max_failed_saves,
            attempt=run.identity["attempts"],
            fence=run.fence,
        ),
        Guard(_safety(config.safety), run.folder.skipped_steps),
        tracker,
        Throughput(
            run.device,
            ranks=run.ranks.size,
            flops_per_image=flops_per_image,
            device_peak_flops=peak_flops(run.device, config.train.precision),
        ),
        stop,
        heartbeat,
        Pacer(run.ranks, run.device),
    )
    status: Any = "failed"
    try:
        only_tried = config.safety.dry_run == "only"
        if not trainer.resume():
            begin_with(config.warm_start, stage)
        if only_tried:
            trainer.dry_run()
        finished = only_tried or trainer.fit()
        if finished and not only_tried:
            trainer.finish()
            if run.ranks.is_main:
                run.fence()
                run.folder.note({**run.folder.identity(), "finished_step": trainer.step})
        status = "finished" if finished else "stopped"
    finally:
        heartbeat.close()
        tracker.close(status)
        for lease in run.lease:
            lease.release()
    barrier()
    disconnect()
    return 0 if status == "finished" else EXIT_STOPPED


def _safety(config: SafetyConfig) -> SafetyOptions:
    return SafetyOptions(
        skips_before_rollback=config.skips_before_rollback,
        max_rollbacks=config.max_rollbacks,
        spike=config.spike,
        spike_window=config.spike_window,
        spike_threshold=config.spike_threshold,
    )


def _checkpoints(run: Run, config: CheckpointConfig, storage: Storage) -> CheckpointManager:
    return CheckpointManager(
        run.folder.checkpoints,
        retention=Retention(
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
            keep_best=config.keep_best,
            best_metric=config.best_metric,
            best_is=config.best_is,
        ),
        max_failed_saves=config.max_failed_saves,
        attempt=run.identity["attempts"],
        fence=run.fence,
        url=config.url,
        beside=BESIDE,
        storage=storage,
    )
