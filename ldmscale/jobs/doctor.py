"""`ldmscale doctor`: this machine or allocation before a long run; with run.dir=DIR, what happened to a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ldmscale.config import DoctorJob
from ldmscale.config.load import configured
from ldmscale.distributed.environment import Ranks

log = logging.getLogger(__name__)


def main(overrides: Sequence[str]) -> int:
    """Examine as asked. 0: nothing is in the way; 2: something is, and is named."""
    config, ranks = configured(DoctorJob, overrides)
    if config.run.dir is not None:
        return _run(Path(config.run.dir))
    return _machine(config, ranks)


def _run(folder: Path) -> int:
    from ldmscale.checkpoint.run_folder import RunFolder
    from ldmscale.cluster.doctor_run import examine_run
    from ldmscale.tracking.logs import set_up_logging

    set_up_logging(None, Ranks())
    found = examine_run(RunFolder(folder))
    log.info("%s\n%s", folder, found.told())
    return 2 if found.faults else 0


def _machine(config: DoctorJob, ranks: Ranks) -> int:
    from ldmscale.cluster.doctor_machine import examine, examine_folder, examine_room, examine_shards
    from ldmscale.cluster.doctor_run import Findings
    from ldmscale.data.shards.urls import expand
    from ldmscale.distributed.collectives import gather_lists
    from ldmscale.distributed.process_group import close_world, open_world
    from ldmscale.setup.attention import attention_of_ranks
    from ldmscale.storage.object_store import Storage
    from ldmscale.tracking.logs import quiet_libraries, set_up_logging

    wanted, folder = config.doctor, Path(config.doctor.folder)
    set_up_logging(None, ranks)
    quiet_libraries()
    world = open_world(ranks)
    parts = [examine(world, wanted.measure_mib, wanted.slow_share)]
    # One rank of each node looks at the disk: all nodes must reach it.
    here = [examine_folder(folder, wanted.measure_mib)] if ranks.local_rank == 0 else []
    parts += [Findings(disk.values if not number else {}, disk.warnings, disk.faults)
              for number, disk in enumerate(gather_lists(here))]  # fmt: skip
    if ranks.is_main and not parts[1].faults and wanted.experiment is not None:
        parts.append(examine_room(folder, _parameters(wanted.experiment), wanted.keep_checkpoints))
    if ranks.is_main and wanted.shards is not None:
        given = wanted.storage
        storage = Storage(given.options, given.endpoint, given.patience_seconds, given.request_seconds)
        parts.append(examine_shards(expand(wanted.shards, storage=storage), wanted.probe_shards, storage))
    values, warnings = attention_of_ranks(world)
    parts.append(Findings(values if ranks.is_main else {}, warnings, []))
    close_world()
    total = Findings()
    for part in parts:
        total.values |= part.values
        total.warnings += part.warnings
        total.faults += part.faults
    if ranks.is_main:
        log.info("%s\n%s", "all is well" if not total.faults else "something is in the way", total.told())
    return 2 if total.faults else 0


def _parameters(experiment: str) -> int:
    """Of what the experiment trains."""
    from ldmscale.inference.load import build

    parts = build(experiment, device="meta")
    trained = parts.denoiser or parts.autoencoder
    assert trained is not None
    return sum(parameter.numel() for parameter in trained.parameters())
