"""The environment of this process: which rank it is, and the launcher that started it. Imports no torch.

The rank is read from the variables of torchrun, our launcher, or Slurm. Slurm is believed only inside a job step (one
task per rank, started by `srun`): the shell of a batch script and the interactive shells of `salloc` and `srun --pty`
also carry SLURM_PROCID and SLURM_NTASKS, but there a command is one process, not a rank.

A rank whose launcher died ends itself: first in good order, and by force if that takes too long. The kernel reports the
launcher's death by SIGTERM, which asks for a stop, but a rank that is stuck in a collective with a dead peer never reaches
the boundary where stops are agreed on.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from ldmscale.errors import ConfigError

log = logging.getLogger(__name__)


LAUNCHER = "LDMSCALE_LAUNCHER_PID"  # set by our launcher for its ranks


GRACE = "LDMSCALE_ORPHAN_SECONDS"  # how long an orphan may take to save and end


PARTED = "LDMSCALE_PARTED"  # a folder; set by our launcher for ranks that will part


_DEFAULT_GRACE_SECONDS = 300.0


_POLL_SECONDS = 1.0


# Slurm numbers the steps that are no real steps (interactive 0xfffffffa, batch 0xfffffffb, extern 0xfffffffc)
# from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_SHELLS = ("bash", "sh", "dash", "zsh", "ksh", "fish", "tcsh", "csh", "ash", "busybox")
_PORT_BASE, _PORT_RANGE = 20_000, 10_000  # below the range from which the kernel hands out ports


@dataclass(frozen=True)
class Ranks:
    """This process: `rank` of `size` in the whole job, `local_rank` of `local_size` on node number `node`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes what exists once."""
        return self.rank == 0


def in_slurm_step(env: Mapping[str, str] = os.environ) -> bool:
    """True for a task that `srun` started; False in a batch script, in an interactive shell (of `salloc` or of
    `srun --pty`), and without Slurm.
    """
    step = env.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in env or not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return False
    return not _in_shell_of_step(env)


def _in_shell_of_step(env: Mapping[str, str]) -> bool:
    """Whether the task is a shell that a person types into (`srun --pty bash`): what is started there is no rank.

    The other tasks of such a step end at once, so that a rank would wait for them for ever. SLURM_PTY_PORT is not enough:
    a step that is started from such a shell inherits it. Its tasks have no terminal.
    """
    task = env.get("SLURM_TASK_PID", "")
    if "SLURM_PTY_PORT" not in env or env["SLURM_PROCID"] != "0" or not task.isdigit():
        return False
    try:
        words = [os.fsdecode(word) for word in Path(f"/proc/{task}/cmdline").read_bytes().split(b"\0")[:-1]]
        # After the name, which may contain anything: state, parent, group, session, terminal (proc(5)).
        terminal = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[4]
    except (OSError, IndexError, UnicodeDecodeError):
        return False
    shell = bool(words) and os.path.basename(words[0]).lstrip("-") in _SHELLS
    asked_to_run = any(
        not word.startswith(("-", "+")) or re.fullmatch(r"-[a-z]*c", word) for word in words[1:]
    )
    return shell and not asked_to_run and terminal != "0"


def read_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Ranks from RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, else from Slurm's variables, else one
    rank.

    Raises ConfigError, with all faults, if variables are missing, are no numbers or contradict each other.
    """
    slurm = in_slurm_step(env)
    if "RANK" in env or "WORLD_SIZE" in env:
        ranks = _from_torchrun(env)
        if slurm and not _starter_in_task(env):
            _check_not_left_over(ranks, _from_slurm(env))
        return ranks
    return _from_slurm(env) if slurm else Ranks()


def _starter_in_task(env: Mapping[str, str]) -> bool:
    """Whether torchrun or our launcher runs inside the task and has numbered its own ranks."""
    return "TORCHELASTIC_RUN_ID" in env or env.get(LAUNCHER, "") == str(os.getppid())


def _check_not_left_over(ranks: Ranks, tasks: Ranks) -> None:
    """Refuse variables of torchrun that contradict Slurm: each task would take itself for the same rank."""
    if tasks.size > 1 and (ranks.rank, ranks.size) != (tasks.rank, tasks.size):
        raise ConfigError(
            f"RANK={ranks.rank} and WORLD_SIZE={ranks.size} are set, but this is task {tasks.rank} of {tasks.size} of a step "
            "of Slurm, and neither torchrun nor launch/local.sh started it: they are left over from the shell that submitted "
            "it; `unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT` there, or, where another "
            "program numbered the ranks on purpose, unset SLURM_PROCID"
        )


def rendezvous(ranks: Ranks, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables by which torch.distributed finds rank 0: what `env` already has is kept, Slurm gives the
    rest.

    Raises ConfigError if there are several ranks and no way to know where rank 0 is.
    """
    variables = {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_size),
    }
    slurm = in_slurm_step(env)
    missing = []
    if "MASTER_ADDR" in env:
        variables["MASTER_ADDR"] = env["MASTER_ADDR"]
    elif ranks.size == ranks.local_size:
        variables["MASTER_ADDR"] = "127.0.0.1"
    elif slurm and (hosts := env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")):
        variables["MASTER_ADDR"] = first_host(hosts)
    else:
        missing.append("MASTER_ADDR is not set: set it to the host name of the node of rank 0.")
    if "MASTER_PORT" in env:
        variables["MASTER_PORT"] = env["MASTER_PORT"]
    elif slurm and env.get("SLURM_JOB_ID", "").isdigit():
        # Another port for every job on a shared node, and for every step of a job.
        number = int(env["SLURM_JOB_ID"]) + 1000 * int(env["SLURM_STEP_ID"])
        variables["MASTER_PORT"] = str(_PORT_BASE + number % _PORT_RANGE)
    elif ranks.size > 1:
        missing.append("MASTER_PORT is not set: set it to a port that is free on the node of rank 0.")
    if missing:
        raise ConfigError(
            [*missing, "Or start the job by launch/local.sh, torchrun or srun, which set both."]
        )
    return variables


def export_rendezvous(ranks: Ranks, env: MutableMapping[str, str] = os.environ) -> None:
    """Write `rendezvous(ranks, env)` into `env`, where torch.distributed and DeepSpeed look for it."""
    env.update(rendezvous(ranks, env))


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: "gpu[007-009,12],login" gives "gpu007".

    Raises ConfigError if there is none.
    """
    match = re.match(r"[^,\[\]]*(\[[^\[\]]*\][^,\[\]]*)*(?=,|$)", nodelist.strip())
    first = match.group(0) if match else ""
    # A bracket holds numbers and ranges, the first of which counts; its leading zeros belong to the name.
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    if not host or "[" in host:
        raise ConfigError(
            f"SLURM_JOB_NODELIST is {nodelist!r}, which is no list of hosts such as 'gpu[007-009,12]': "
            "set MASTER_ADDR to the host name of the node of rank 0."
        )
    return host


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks on node number `node` by Slurm's short form: "2(x3),1" stands for 2, 2, 2, 1.

    Raises ConfigError if the text is not of that form or has fewer nodes.
    """
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE is {tasks_per_node!r}; expected a form such as '2(x3),1'."
            )
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    if not 0 <= node < len(counts):
        raise ConfigError(
            f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} is for {len(counts)}."
        )
    return counts[node]


def _from_torchrun(env: Mapping[str, str]) -> Ranks:
    rank, size, local_rank = _numbers(env, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    (local_size,) = _numbers(env, "torchrun", "LOCAL_WORLD_SIZE")
    default_node = rank // local_size if local_size > 0 else 0
    node = _numbers(env, "torchrun", "GROUP_RANK")[0] if "GROUP_RANK" in env else default_node
    return _checked(Ranks(rank, size, local_rank, local_size, node), "RANK", "WORLD_SIZE", "LOCAL_RANK")


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    rank, size, local_rank = _numbers(env, "srun", "SLURM_PROCID", size_name, "SLURM_LOCALID")
    node = _numbers(env, "srun", "SLURM_NODEID")[0] if "SLURM_NODEID" in env else 0
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    local_size = tasks_on_node(tasks, node) if tasks else size
    return _checked(
        Ranks(rank, size, local_rank, local_size, node), "SLURM_PROCID", size_name, "SLURM_LOCALID"
    )


def _numbers(env: Mapping[str, str], starter: str, *names: str) -> list[int]:
    faults = []
    for name in names:
        value = env.get(name)
        if value is None:
            faults.append(
                f"{name} is not set, though other variables of {starter} are: start all ranks by {starter}."
            )
        elif not value.isdigit():
            faults.append(f"{name} is {value!r}, expected a whole number: start all ranks by {starter}.")
    if faults:
        raise ConfigError(faults)
    return [int(env[name]) for name in names]


def _checked(ranks: Ranks, rank_name: str, size_name: str, local_name: str) -> Ranks:
    faults = []
    if not ranks.rank < ranks.size:
        faults.append(f"{rank_name}={ranks.rank} must be below {size_name}={ranks.size}.")
    if not ranks.local_rank < ranks.local_size:
        faults.append(
            f"{local_name}={ranks.local_rank} must be below the ranks of this node, {ranks.local_size}."
        )
    if ranks.local_size > ranks.size:
        faults.append(f"This node has {ranks.local_size} ranks, but {size_name}={ranks.size}.")
    if ranks.local_rank > ranks.rank:
        faults.append(f"{local_name}={ranks.local_rank} is above {rank_name}={ranks.rank}.")
    if faults:
        raise ConfigError(
            [*faults, f"Unset {rank_name} and {size_name} to run as one process, or start all ranks anew."]
        )
    return ranks


def watch_launcher(on_death: Callable[[], None], env: Mapping[str, str] = os.environ) -> None:
    """Call `on_death` from a thread once the launcher of this rank is gone, and end the process later.

    Does nothing in a process that our launcher did not start.
    """
    launcher = env.get(LAUNCHER, "")
    if launcher.isdigit() and os.getppid() == int(launcher):
        grace = float(env.get(GRACE, _DEFAULT_GRACE_SECONDS))
        watch = threading.Thread(target=_watch, args=(int(launcher), on_death, grace), daemon=True)
        watch.start()


def _watch(launcher: int, on_death: Callable[[], None], grace: float) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    on_death()
    time.sleep(grace)
    log.critical(
        "the launcher died %.0f s ago, and this rank could not stop in good order: it ends now", grace
    )
    os._exit(1)


def part(rank: int, env: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher, if it is ours, that this rank waits for no other from now on."""
    if folder := env.get(PARTED):
        (Path(folder) / str(rank)).touch()


def have_parted(folder: Path, ranks: Iterable[int]) -> bool:
    """Whether all these ranks have."""
    return all((folder / str(rank)).exists() for rank in ranks)
