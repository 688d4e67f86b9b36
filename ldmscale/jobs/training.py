"""What the two training jobs share: opening the run, its data and its trainer, and closing it with an exit status."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldmscale.checkpoint import CheckpointManager, Retention
from ldmscale.checks.data import SYNTHETIC
from ldmscale.config import (
    CheckpointConfig,
    DiffusionJob,
    EmaConfig,
    OptimConfig,
    SafetyConfig,
    TrainConfig,
    TrainingJob,
    ZeroConfig,
)
from ldmscale.data.budget import Budget
from ldmscale.data.ledger import Ledger
from ldmscale.data.loader import Batch, Loader, MakeItem
from ldmscale.data.mixture import Mixture
from ldmscale.distributed.collectives import barrier, from_main_rank
from ldmscale.distributed.environment import Ranks, export_rendezvous
from ldmscale.distributed.heartbeat import Heartbeat
from ldmscale.distributed.lease import Lease, LeaseHeldError
from ldmscale.distributed.stop import EXIT_STOPPED, StopFlag
from ldmscale.distributed.world import choose_device
from ldmscale.errors import ConfigError, StoppedEarlyError
from ldmscale.jobs.open_index import Patterns, open_index
from ldmscale.jobs.synthetic import synthetic_shards
from ldmscale.jobs.warm_start import begin_with
from ldmscale.networks import BLOCKS
from ldmscale.provenance import about_run
from ldmscale.run_folder import RunFolder
from ldmscale.stages.validation import HeldOut
from ldmscale.tracking.logs import quiet_libraries, set_up_logging
from ldmscale.tracking.throughput import Throughput, peak_flops
from ldmscale.tracking.tracker import Tracker
from ldmscale.train.ema import PowerEma, ShardedEma, decay_kind
from ldmscale.train.engine import Engine, connect, disconnect
from ldmscale.train.engine_options import EngineOptions
from ldmscale.train.rates import learning_rate
from ldmscale.train.safety import Guard, SafetyOptions
from ldmscale.train.stage import Stage
from ldmscale.train.trainer import Schedule, Trainer
from ldmscale.validate import plain

log = logging.getLogger(__name__)

_WAIT_TURN_SECONDS = 5.0


@dataclass(frozen=True)
class Run:
    """An opened run: where it lives, who takes part, and what it reads."""

    lease: list[Lease]  # of the folder, on rank 0
    folder: RunFolder
    ranks: Ranks
    device: torch.device
    identity: Mapping[str, Any]
    shards: list[str]
    index: Mixture
    accumulation_steps: int

    def fence(self) -> None:
        """Raise LeaseLostError if another start has taken the run over; rank 0 looks for all."""
        for lease in self.lease:
            lease.check()

    def note(self, name: str, value: Any) -> None:
        """Write down in run.json what this start found out. Rank 0 writes; the others may call it."""
        if self.ranks.is_main:
            self.folder.note({**self.folder.identity(), name: value})


def open_run(config: TrainingJob, ranks: Ranks, stop: StopFlag) -> Run:
    """Join the process group, write down what runs, and open the index of the shards (made where it is missing)."""
    stop.limit(config.run.max_hours, config.run.margin_minutes)
    folder = RunFolder(config.run.dir)
    changes = folder.changes(plain(config))  # refuses before any device is touched
    device = choose_device(ranks)
    if ranks.size > 1:
        export_rendezvous(ranks)
    connect(device, timeout_seconds=60 * config.safety.first_step_timeout_minutes)
    lease = _hold(folder, config, stop)
    from_main_rank(lambda: folder.settle_config(plain(config)))
    set_up_logging(folder.path, ranks)
    quiet_libraries()
    for change in changes:
        log.info("resuming with a change: %s", change)
    identity = from_main_rank(lambda: folder.begin_attempt(lease[0].number))
    index = open_index(_patterns(config, folder), config.data, ranks)
    shards = index.shards
    log.info("%s samples in %d shards, %d ranks on %s", f"{index.total:,}", len(shards), ranks.size, device)
    train = config.train
    return Run(
        lease,
        folder,
        ranks,
        device,
        identity,
        shards,
        index,
        train.global_batch // (train.rank_micro_batch * ranks.size),
    )


def _hold(folder: RunFolder, config: TrainingJob, stop: StopFlag) -> list[Lease]:
    """Keep other starts away: a list with the lease on rank 0, an empty one elsewhere.

    Raises ConfigError where another start holds the folder, unless `run.wait` says to wait for it.
    """
    lease: list[Lease] = []

    def lost() -> None:
        log.critical(
            "another start has taken %s over, since this one showed no life: it ends now", folder.path
        )
        os._exit(1)  # the training may be stuck in a collective with ranks that are gone

    def attempt() -> str | None:
        seconds = config.run.lease_seconds
        try:
            # Waiting goes on in turns: the other ranks must not time out, and signals must be heard.
            turn = _WAIT_TURN_SECONDS if config.run.wait else 0.0
            lease.append(folder.hold(timeout_seconds=seconds, wait_seconds=turn, on_lost=lost))
        except LeaseHeldError as held:
            return str(held)
        return None

    while held := from_main_rank(attempt):
        if not config.run.wait:
            raise ConfigError(f"{held}: wait for it (run.wait=true does), end it, or give another run.name")
        if stop.agreed():
            raise StoppedEarlyError(f"asked to stop while waiting: {held}")
    for held_here in lease:
        atexit.register(held_here.release)
    return lease


def _patterns(config: TrainingJob, folder: RunFolder) -> Patterns:
    data = config.data
    if data.shards != SYNTHETIC:
        return data.shards
    latent, size = config.autoencoder, data.image_size or 32
    from_main_rank(
        lambda: synthetic_shards(folder.path / "data", data.kind, size, latent.latent_channels, latent.factor)
    )
    return str(folder.path / "data" / "*.tar")


def make_loader(
    run: Run,
    config: TrainingJob,
    reader: MakeItem,
    position: int,
    consumed: Sequence[int] | None = None,
    *,
    workers: int | None = None,
) -> Loader:
    """The training loader from a position on (with buckets: from what each of them has given)."""
    return Loader(
        run.index,
        reader,
        seed=config.seed,
        rank=run.ranks.rank,
        world=run.ranks.size,
        global_batch=config.train.global_batch,
        rank_micro_batch=config.train.rank_micro_batch,
        position=position,
        consumed=consumed,
        workers=config.data.workers if workers is None else workers,
        ledger=Ledger(run.folder.ledger, run.ranks.rank),
        block_shards=config.data.shuffle_block_shards,
        pin_memory=run.device.type == "cuda",
    )


def picture_batch(run: Run, config: TrainingJob, reader: MakeItem) -> Batch:
    """The fixed images of previews, the same on every rank: from the held-out shards, else the first of the order."""
    index = run.index
    if config.data.heldout_shards is not None:
        index = open_index(config.data.heldout_shards, config.data, run.ranks)
    count = min(config.preview.images, index.total)
    return next(Loader(index, reader, seed=0, rank=0, world=1, global_batch=count, rank_micro_batch=count))


def held_out(run: Run, config: DiffusionJob, reader: MakeItem) -> HeldOut | None:
    """This rank's share of the samples that the validation loss is measured on; None where it is not asked for."""
    chosen = config.validation
    if not chosen.every_steps:
        return None
    assert config.data.heldout_shards is not None
    index = open_index(config.data.heldout_shards, config.data, run.ranks)
    samples, size = min(chosen.samples, index.total), config.train.rank_micro_batch
    passes = -(-samples // (size * run.ranks.size))
    loader = Loader(
        index, reader, seed=0, rank=run.ranks.rank, world=run.ranks.size,
        global_batch=passes * size * run.ranks.size, rank_micro_batch=size,
    )  # fmt: skip
    batches = [next(loader) for _ in range(passes)]
    loader.close()
    return HeldOut(batches, samples, chosen.timestep_bins)


def _first_sample(run: Run, reader: MakeItem) -> Batch:
    return next(Loader(run.index, reader, seed=0, rank=0, world=1, global_batch=1, rank_micro_batch=1))


def engine_options(
    run: Run, train: TrainConfig, optim: OptimConfig, zero: ZeroConfig, lr_scale: float = 1.0
) -> EngineOptions:
    """DeepSpeed's side of the configuration."""
    return EngineOptions(
        zero_stage=zero.stage,
        precision=train.precision,
        rank_micro_batch=train.rank_micro_batch,
        accumulation_steps=run.accumulation_steps,
        gradient_clip_norm=optim.gradient_clip_norm,
        optimizer=optim.kind,
        learning_rate=optim.rate(train.global_batch) * lr_scale,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        persistence_threshold=zero.persistence_threshold,
        bucket_elements=zero.bucket_elements,
        prefetch_elements=zero.prefetch_elements,
        leaf_types=BLOCKS if zero.leaf_blocks else (),
        overlap_communication=zero.overlap_communication and run.device.type == "cuda",
    )


def averages_of(engine: Engine, config: EmaConfig) -> list[ShardedEma]:
    """The averages of a network's weights that are kept, the one for pictures first."""
    if not config.enabled:
        return []
    kept = [ShardedEma(engine.masters, config.decay, warmup=config.warmup)]
    kept += [
        ShardedEma(engine.masters, decay, warmup=config.warmup, kind=decay_kind(decay))
        for decay in config.decays
    ]
    return kept + [PowerEma(engine.masters, width) for width in config.power_widths]


def rate_curve(optim: OptimConfig, train: TrainConfig, scale: float = 1.0) -> Callable[[int], float]:
    """The learning rate as a function of the finished steps."""

    def rate(step: int) -> float:
        return learning_rate(
            step,
            base=optim.rate(train.global_batch) * scale,
            curve=optim.curve,
            warmup_steps=optim.warmup_steps,
            total_steps=train.max_steps,
            final_share=optim.final_lr_share,
        )

    return rate


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
        lambda: _first_sample(run, reader),
        Schedule(
            max_steps=config.train.max_steps,
            accumulation_steps=run.accumulation_steps,
            log_every_steps=config.train.log_every_steps,
            save_every_steps=config.checkpoint.save_every_steps,
            ephemeral_every_steps=config.checkpoint.ephemeral_every_steps,
            picture_every_steps=config.preview.every_steps,
            validate_every_steps=config.validation.every_steps,
            average_every_steps=config.ema.store_every_steps,
            garbage_every_steps=config.train.garbage_every_steps,
            dry_run=config.safety.dry_run is True,
            step_timeout_seconds=60 * config.safety.step_timeout_minutes,
        ),
        rates,
        _checkpoints(run, config.checkpoint),
        CheckpointManager(run.folder.averages, retention=Retention(keep_last=sys.maxsize)),
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


def _checkpoints(run: Run, config: CheckpointConfig) -> CheckpointManager:
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
    )


def already_finished(config: TrainingJob, ranks: Ranks) -> bool:
    """Whether the run in this folder has reached `train.max_steps`, which is then said."""
    folder = RunFolder(config.run.dir)
    folder.changes(plain(config))
    step = folder.finished_step()
    if step is None or step < config.train.max_steps:
        return False
    set_up_logging(None, ranks)
    log.info(
        "%s has finished: %d steps are done. A larger train.max_steps goes on with it", folder.path, step
    )
    return True
