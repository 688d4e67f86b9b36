"""Opening a run: its folder, its ranks and its shards; or finding that it has finished."""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldmscale.checkpoint.recovery import recover
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.config import TrainingJob
from ldmscale.config.checks.data import SYNTHETIC
from ldmscale.config.resume import changes
from ldmscale.config.typed import plain
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.sources.synthetic import synthetic_shards
from ldmscale.distributed.collectives import from_main_rank
from ldmscale.distributed.devices import arithmetic, choose_device, describe
from ldmscale.distributed.environment import Ranks, export_rendezvous
from ldmscale.distributed.flight_recorder import record_collectives
from ldmscale.distributed.preemption import StopFlag
from ldmscale.errors import ConfigError, StoppedEarlyError
from ldmscale.setup.index import Patterns, open_index, storage_of
from ldmscale.setup.node_checks import check_processes
from ldmscale.storage.lease import Lease, LeaseHeldError
from ldmscale.tracking.logs import quiet_libraries, set_up_logging
from ldmscale.train.engine.process import connect
from ldmscale.waiting import Wait

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
        """Raise LeaseLostError if another start has taken the run over, on any rank and in any thread."""
        self.folder.check_held(self.identity["attempts"])

    def note(self, name: str, value: Any) -> None:
        """Write down in run.json what this start found out. Rank 0 writes; the others may call it."""
        if self.ranks.is_main:
            self.folder.note({**self.folder.identity(), name: value})


def open_run(config: TrainingJob, ranks: Ranks, stop: StopFlag) -> Run:
    """Join the process group, write down what runs, and open the index of the shards (made where it is missing)."""
    stop.limit(config.run.max_hours, config.run.margin_minutes)
    folder = RunFolder(config.run.dir)
    changes(folder, plain(config))  # refuses before any device is touched
    check_processes(ranks, config.data.workers)
    device = choose_device(ranks)
    if ranks.size > 1:
        export_rendezvous(ranks)
    record_collectives(folder.path / "logs")
    connect(device, timeout_seconds=60 * config.safety.first_step_timeout_minutes)
    lease = _hold(folder, config, ranks, stop)
    changed = from_main_rank(lambda: _settle(folder, config))
    set_up_logging(folder.path, ranks)
    quiet_libraries()
    for change in changed:
        log.info("resuming with a change: %s", change)
    identity = from_main_rank(lambda: folder.begin_attempt(lease[0].number))
    before = identity.get("ranks")
    if before not in (None, ranks.size):
        log.info("resuming with a change: the number of ranks was %s, is %d", before, ranks.size)
    index = open_index(_patterns(config, folder), config.data, ranks)
    shards = index.shards
    log.info("%s samples in %d shards, %d ranks on %s", f"{index.total:,}", len(shards), ranks.size, device)
    train = config.train
    run = Run(
        lease,
        folder,
        ranks,
        device,
        identity,
        shards,
        index,
        train.global_batch // (train.rank_micro_batch * ranks.size),
    )
    run.note("ranks", ranks.size)
    run.note("device", {"is": describe(device), "arithmetic": arithmetic()})
    log.info("device: %s", describe(device))
    return run


def _settle(folder: RunFolder, config: TrainingJob) -> list[str]:
    """Write the configuration of a new run down; what a resume changes, else. Also of a run whose folder was lost."""
    recover(folder, config.checkpoint.url, storage_of(config.data))
    changed = changes(folder, plain(config))
    folder.settle_config(plain(config))
    return changed


def _hold(folder: RunFolder, config: TrainingJob, ranks: Ranks, stop: StopFlag) -> list[Lease]:
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

    # Until the holder ends: `run.wait` asks for that. Ranks agree on a stop below.
    wait = Wait(lambda: f"{held} (run.wait=true)", limit_seconds=math.inf, obeys_stop=False)
    while held := from_main_rank(attempt):
        if not config.run.wait:
            raise ConfigError(f"{held}: wait for it (run.wait=true does), end it, or give another run.name")
        if stop.agreed():
            raise StoppedEarlyError(f"asked to stop while waiting: {held}")
        if ranks.is_main:
            wait.check()
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


def already_finished(config: TrainingJob, ranks: Ranks) -> bool:
    """Whether the run in this folder has reached `train.max_steps`, which is then said."""
    folder = RunFolder(config.run.dir)
    changes(folder, plain(config))
    step = folder.finished_step()
    if step is None or step < config.train.max_steps:
        return False
    set_up_logging(None, ranks)
    log.info(
        "%s has finished: %d steps are done. A larger train.max_steps goes on with it", folder.path, step
    )
    return True
