"""Faults of what is asked of a cluster."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from ldmscale.config import ClusterConfig, DoctorJob, WandbSyncJob
from ldmscale.config.compose import config_folder

# sbatch's notations of a duration: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_DURATION = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Unicode's categories of control characters and of halves of a surrogate pair, which stand for bytes that are not UTF-8.
_UNWRITABLE = ("Cc", "Cs")


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
    for name in cluster.environment:
        if not _VARIABLE.fullmatch(name):
            faults.append(
                f"cluster.environment: {name!r} is not a name of a variable: expected letters, digits and underscores, "
                "not a digit first; rename it"
            )
    if cluster.python is not None and cluster.python.startswith("-"):
        faults.append(
            f"cluster.python={cluster.python!r} begins with '-': srun reads it as an option; give a path"
        )
    return [*faults, *_unwritable(cluster)]


def check_script_paths(paths: Mapping[str, str]) -> list[str]:
    """Faults of `paths` (by the setting that each comes from) that a job script and Slurm's options cannot hold.

    The quotes of a shell keep a newline, but Slurm's options are comment lines of the script, which a newline ends:
    what follows it would run as a command. A backslash is an escape to Slurm, also within quotes and in file names.
    """
    faults = []
    for setting, value in paths.items():
        if found := _control_character(value):
            faults.append(
                f"{setting}={value!r} contains {found}, which a job script cannot hold: give another path"
            )
        elif "\\" in value:
            faults.append(f"{setting}={value!r} contains a backslash, an escape to Slurm: give another path")
    return faults


def _unwritable(cluster: ClusterConfig) -> Iterator[str]:
    """Faults of texts that a job script cannot hold. A line of `setup` is shell code and may contain line ends."""
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        allowed = "\n\t" if field.name == "setup" else ""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, str) and (found := _control_character(part, allowed)):
                yield f"cluster.{field.name}: {part!r} contains {found}, which a job script cannot hold; remove it"


def _control_character(text: str, allowed: str = "") -> str | None:
    """The first character of `text` that a job script cannot hold, in words; None if it holds none."""
    for character in text:
        if unicodedata.category(character) in _UNWRITABLE and character not in allowed:
            return f"the control character {character!r}"
    return None


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
