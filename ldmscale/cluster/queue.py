"""Asking Slurm: handing a script in, and whether an earlier submission is still there."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from ldmscale.errors import ConfigError

_SECONDS = 60.0  # a controller under load answers late; beyond this it does not answer


def sbatch(script: Path, after: str | None = None) -> str:
    """Queue `script`, once job `after` has ended well, and return the job's number.

    Raises ConfigError with what Slurm said where it refuses.
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        # Otherwise a job whose predecessor failed would wait for ever.
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return _ask([*command, str(script)]).split(";")[0]


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
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not on this machine: submit on a login node of the cluster, or give --dry-run to see "
            "the script"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command[0]} gave no answer in {_SECONDS:.0f} s: is the controller up?") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ConfigError(f"{command[0]} refused: {said}")
    return done.stdout.strip()
