"""Faults of what is asked of a cluster."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldmscale.config import ClusterConfig, DoctorJob, WandbSyncJob
from ldmscale.config.folders import config_folder

# sbatch's notations of a duration: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_DURATION = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
_GPUS = re.compile(r"([A-Za-z][\w.-]*:)?\d+", re.ASCII)
_EXPANDED = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})", re.ASCII)
# Variables whose value in the batch script is that of the first node, or of no rank.
_OF_ONE_TASK = frozenset(
    [
        "HOSTNAME",
        "SLURMD_NODENAME",
        "SLURM_NODEID",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_ID",
        "SLURM_TASK_PID",
        "RANK",
        "LOCAL_RANK",
        "CUDA_VISIBLE_DEVICES",
    ]
)
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
    if not _GPUS.fullmatch(str(cluster.gpus_per_node)):
        faults.append(
            f"cluster.gpus_per_node={cluster.gpus_per_node!r}: expected a number, or a type and a number such as a100:4"
        )
    elif cluster.gpus and cluster.tasks_per_node > cluster.gpus:
        faults.append(
            f"cluster.tasks_per_node={cluster.tasks_per_node} with cluster.gpus_per_node={cluster.gpus_per_node}: "
            f"every rank needs a GPU of its own; give cluster.tasks_per_node={cluster.gpus}"
        )
    if cluster.min_nodes is not None and cluster.min_nodes > cluster.nodes:
        faults.append(
            f"cluster.min_nodes={cluster.min_nodes} is more than cluster.nodes={cluster.nodes}: give the smaller first"
        )
    if not cluster.requeue and cluster.array is not None:
        faults.append(
            f"cluster.requeue=false with cluster.array={cluster.array}: Slurm starts jobs of one name one after the other, and "
            "an array at once; leave the array away, and give cluster.nodes instead"
        )
    for option in cluster.options:
        if option.startswith("--container"):
            faults.append(
                f"cluster.options: {option} would start the job script itself in the container, where srun is not, and most "
                "sites know it for srun only: give it in cluster.srun_options"
            )
    return [*faults, *_environment(cluster), *_python(cluster), *_unwritable(cluster)]


def _environment(cluster: ClusterConfig) -> Iterator[str]:
    for name, value in cluster.environment.items():
        if not _VARIABLE.fullmatch(name):
            yield (
                f"cluster.environment: {name!r} is not a name of a variable: expected letters, digits and underscores, "
                "not a digit first; rename it"
            )
        for used in (part.name for part in expanded(value) if part.name is not None):
            if used in _OF_ONE_TASK:
                yield (
                    f"cluster.environment.{name}={value!r}: ${used} differs between nodes or ranks, and a value is expanded "
                    "once, where the job starts; set the variable in the program that reads it, or use $SLURM_JOB_ID"
                )


def _python(cluster: ClusterConfig) -> Iterator[str]:
    words = cluster.python_words
    contained = any(option.startswith("--container-image") for option in cluster.srun_options)
    if words is None:
        if contained:
            yield (
                "cluster.python is not set, and cluster.srun_options starts a container: give the interpreter inside the "
                "container, such as cluster.python=python3"
            )
        return
    if not words or not words[0] or words[0].startswith("-"):
        yield f"cluster.python={cluster.python!r} begins with no program: srun reads '-' as an option; give a path"
    elif isinstance(cluster.python, str) and " " in cluster.python and not Path(cluster.python).exists():
        listed = ", ".join(cluster.python.split())
        yield (
            f"cluster.python={cluster.python!r} is one path with spaces, and there is no such file: give a command as a list of "
            f"words, cluster.python=[{listed}]"
        )


def python_hint(cluster: ClusterConfig) -> str | None:
    """What to look at where the interpreter is not on this machine; it may be on the nodes all the same."""
    words = cluster.python_words
    if words is None or any(option.startswith("--container-image") for option in cluster.srun_options):
        return None
    if shutil.which(words[0]) is not None:
        return None
    return (
        f"cluster.python: {words[0]} is not on this machine; make sure that the nodes have it, or that cluster.setup puts it "
        "into PATH"
    )


@dataclass(frozen=True)
class Part:
    """A part of a value: text as it is, or the variable `name`."""

    text: str
    name: str | None = None


def expanded(value: str) -> list[Part]:
    """The parts of a value of `cluster.environment`: $NAME and ${NAME} are variables, $$ is a dollar, all else is text."""
    parts, text, end = [], "", 0
    for found in _EXPANDED.finditer(value):
        text += value[end : found.start()]
        end = found.end()
        name = found["name"] or found["braced"]
        if name is None:
            text += "$"
        else:
            parts += [Part(text), Part("", name)]
            text = ""
    return [part for part in [*parts, Part(text + value[end:])] if part.text or part.name]


def time_as_text(values: Mapping[str, Any], on_command_line: bool) -> list[str]:
    """The fault of a `cluster.time` that a file holds as a number.

    YAML 1.1 reads 4:00:00 without quotes as a number to the base 60, 14400, which sbatch would take for minutes.
    """
    value = (values.get("cluster") or {}).get("time")
    if on_command_line or isinstance(value, str) or value is None:
        return []
    found = f"cluster.time is the number {value} in the file of the cluster"
    if isinstance(value, int) and value >= 60:
        hours, minutes = divmod(value // 60, 60)
        found += f", which 4:00:00 without quotes becomes too; for {hours}:{minutes:02}:{value % 60:02} write"
        return [f'{found} time: "{hours}:{minutes:02}:{value % 60:02}", for {value} minutes time: "{value}"']
    return [f'{found}: write it in quotes, such as time: "4:00:00", or time: "{value}" for minutes']


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
        allowed = "\n\t" if field.name in ("setup", "node_setup") else ""
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
