"""The job script: sbatch's options from the cluster's facts, then the body in slurm/job.sbatch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ldmscale.cluster.submission import Frozen
from ldmscale.config import ClusterConfig
from ldmscale.config.checks.cluster import expanded
from ldmscale.errors import ConfigError
from ldmscale.waiting import WaitTimeoutError, finished

_BODY_BEGINS = "set -euo pipefail"
# Variables of ranks that the shell which submits may hold, and sbatch passes on: each rank would believe to be the same.
_LEFT_OVER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def body_file() -> Path:
    """slurm/job.sbatch, inside the installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "slurm" / "job.sbatch"
    return inside if inside.is_file() else package.parent / "slurm" / "job.sbatch"


def render(frozen: Frozen, job: str, name: str, logs: Path, directory: Path, cluster: ClusterConfig) -> str:
    """The script of one submission. Paths and names are those that `check_script_paths` and `check_cluster` accept.

    Args:
        frozen: the submission; the script names its folder.
        job: of ldmscale. name: shown by squeue.
        logs: folder that receives the output, appended at each attempt.
        directory: in which the ranks start; relative paths of the configuration are meant from there.
        cluster: what is asked of Slurm.
    """
    body = body_file().read_text()
    body = body[body.index(_BODY_BEGINS) :]
    values = {
        "JOB": job,
        "FROZEN": str(frozen.folder),
        "REQUEUE": "1" if cluster.requeue else "0",
        "MAX_REQUEUES": str(cluster.max_requeues),
        "MAX_FAILURES": str(cluster.max_failures_without_progress),
        "NODE_SETUP": "\n".join(cluster.node_setup),
    }
    lists = {"PYTHON": cluster.python_words or (sys.executable,), "SRUN_OPTIONS": cluster.srun_options}
    lines = [
        "#!/usr/bin/env bash",
        f"# {job}: rendered by `ldmscale submit`; the configuration and the code that it runs are in its folder.",
        # Of values in single quotes nothing is expanded, on purpose.
        "# shellcheck disable=SC2016",
        *(f"#SBATCH {option}" for option in options(name, logs, directory, cluster)),
        "",
        # Without -u: scripts of modules and conda read variables that are not set.
        "set -eo pipefail",
        f"unset {' '.join(_LEFT_OVER)}",
        *(f"LDMSCALE_{key}={shlex.quote(value)}" for key, value in values.items()),
        *(f"LDMSCALE_{key}=({' '.join(map(shlex.quote, words))})" for key, words in lists.items()),
        *(f"export {key}={_value(key, value)}" for key, value in cluster.environment.items()),
        *_setup(cluster.setup),
        "",
    ]
    return "\n".join(lines) + body


def _setup(lines: Sequence[str]) -> list[str]:
    """The lines of `cluster.setup`; the first that fails ends the job and is named in its output."""
    if not lines:
        return []
    # Not ERR: a function that fails, as `module` is one, ends the shell without that trap.
    message = "ldmscale: cluster.setup failed with status $status: $LDMSCALE_LINE"
    failed = f'status=$?; if ((status)); then echo "{message}" >&2; exit 1; fi'
    checked = [text for line in lines for text in (f"LDMSCALE_LINE={shlex.quote(line)}", line)]
    return [f"trap {shlex.quote(failed)} EXIT", *checked, "trap - EXIT"]


def _value(key: str, value: str) -> str:
    """A value of `cluster.environment` as a word of the shell: nothing but variables is expanded."""
    return (
        "".join(
            shlex.quote(part.text)
            if part.name is None
            else f'"${{{part.name}:?is not set, and cluster.environment.{key} is made of it}}"'
            for part in expanded(value)
        )
        or "''"
    )


def options(name: str, logs: Path, directory: Path, cluster: ClusterConfig) -> list[str]:
    """Options of sbatch, one a line."""
    nodes = f"{cluster.min_nodes}-{cluster.nodes}" if cluster.min_nodes else str(cluster.nodes)
    pattern = "slurm_%A_%a.out" if cluster.array else "slurm_%j.out"
    # Slurm replaces %j, %x and the like in the name of the output, also where they are part of the folder's name.
    output = f"{str(logs).replace('%', '%%')}/{pattern}"
    given = [
        ("job-name", name),
        ("nodes", nodes),
        ("ntasks-per-node", cluster.tasks_per_node),
        ("gpus-per-node", cluster.gpus_per_node or None),
        ("cpus-per-task", cluster.cpus_per_task),
        ("mem", cluster.memory_per_node),
        ("time", cluster.time),
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("constraint", cluster.constraint),
        ("exclude", ",".join(cluster.exclude) or None),
        ("array", f"0-{cluster.array - 1}" if cluster.array else None),
        ("signal", f"B:USR1@{cluster.stop_before_end_seconds}"),
        ("chdir", directory),
        ("output", output),
    ]
    return [
        *(f"--{key}={shlex.quote(str(value))}" for key, value in given if value is not None),
        "--requeue" if cluster.requeue else "--no-requeue",
        "--open-mode=append",
        *cluster.options,
    ]


_SECONDS = 60.0  # a controller under load answers late; beyond this it does not answer


def dependency(after: str | None = None, *, singleton: bool = False) -> list[str]:
    """Options of sbatch: start once job `after` has ended well, and, with `singleton`, no job of the same name runs."""
    conditions = [] if after is None else [f"afterok:{after}"]
    conditions += ["singleton"] if singleton else []
    # Otherwise a job whose predecessor failed would wait for ever.
    kill = [] if after is None else ["--kill-on-invalid-dep=yes"]
    return [f"--dependency={','.join(conditions)}", *kill] if conditions else []


def sbatch(script: Path, after: str | None = None, *, singleton: bool = False) -> str:
    """Queue `script` with `dependency(after, singleton=singleton)`, and return the job's number.

    Raises ConfigError with what Slurm said where it refuses.
    """
    command = ["sbatch", "--parsable", *dependency(after, singleton=singleton), str(script)]
    return _ask(command).split(";")[0]


def unfinished(job: str, script: Path) -> str | None:
    """The state of a job of this script that waits or runs; None once it has ended, or where nobody knows it.

    In a run folder that came from another cluster the number may be that of somebody else's job here.
    """
    try:
        rows = _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T %o"]).splitlines()
    except ConfigError:
        return None  # squeue forgets a job soon after its end, and then calls its number invalid
    states = [row.partition(" ")[0] for row in rows if row.partition(" ")[2].strip() == str(script)]
    return states[0] if states else None


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs back out of the queue."""
    if jobs:
        _ask(["scancel", *jobs])


def _ask(command: Sequence[str]) -> str:
    try:
        done = finished(
            command, cause=f"{command[0]}, which asks the controller of Slurm", limit_seconds=_SECONDS
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not on this machine: submit on a login node of the cluster, or give --dry-run to see "
            "the script"
        ) from None
    except WaitTimeoutError:
        raise ConfigError(f"{command[0]} gave no answer in {_SECONDS:.0f} s: is the controller up?") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
        raise ConfigError(f"{command[0]} refused: {said}")
    return done.stdout.decode("utf-8", "replace").strip()
