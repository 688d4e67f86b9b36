"""Faults of what is asked of a cluster."""

from __future__ import annotations

import re
from pathlib import Path

from ldmscale.config import ClusterConfig, DoctorJob, WandbSyncJob
from ldmscale.config.compose import config_folder

# sbatch's notations of a duration: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_DURATION = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")


def check_cluster(cluster: ClusterConfig) -> list[str]:
    """Faults that Slurm would find late, or not at all."""
    faults = []
    if not _DURATION.fullmatch(cluster.time):
        faults.append(
            f"cluster.time={cluster.time!r}: expected minutes, hours:minutes:seconds or days-hours, such as 24:00:00"
        )
    elif seconds(cluster.time) <= cluster.stop_before_end_seconds:
        faults.append(
            f"cluster.time={cluster.time} is no longer than cluster.stop_before_end_seconds="
            f"{cluster.stop_before_end_seconds}: the job would stop before it starts; give a longer cluster.time"
        )
    if cluster.gpus_per_node and cluster.tasks_per_node > cluster.gpus_per_node:
        faults.append(
            f"cluster.tasks_per_node={cluster.tasks_per_node} with cluster.gpus_per_node={cluster.gpus_per_node}: "
            f"every rank needs a GPU of its own; give cluster.tasks_per_node={cluster.gpus_per_node}"
        )
    if cluster.min_nodes is not None and cluster.min_nodes > cluster.nodes:
        faults.append(
            f"cluster.min_nodes={cluster.min_nodes} is more than cluster.nodes={cluster.nodes}: give the smaller first"
        )
    return faults


def check_doctor(config: DoctorJob) -> list[str]:
    """Faults of what the doctor is asked to look at."""
    wanted = config.doctor
    faults = []
    if config.run.dir is not None and not Path(config.run.dir).is_dir():
        faults.append(f"run.dir={config.run.dir}: there is no such folder; give the folder of a run")
    if (
        wanted.experiment is not None
        and not (config_folder() / "experiment" / f"{wanted.experiment}.yaml").exists()
    ):
        faults.append(
            f"doctor.experiment={wanted.experiment}: there is no conf/experiment/{wanted.experiment}.yaml"
        )
    return faults


def check_replay(config: WandbSyncJob) -> list[str]:
    """Faults of what is to be sent to W&B."""
    faults = []
    if not (Path(config.run.dir) / "metrics.jsonl").is_file():
        faults.append(f"run.dir={config.run.dir}: it has no metrics.jsonl; give the folder of a run")
    if config.tracking.wandb == "off":
        faults.append("tracking.wandb=off: nothing would be sent; give online, offline or auto")
    return faults


def seconds(duration: str) -> int:
    """Seconds of a duration in sbatch's notation."""
    days, dash, rest = duration.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        parts += [0] * (3 - len(parts))  # hours first
    elif len(parts) == 1:
        parts = [0, parts[0], 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    return int(days or 0) * 86_400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
