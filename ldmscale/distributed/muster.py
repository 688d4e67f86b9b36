"""How ranks find each other: the store behind a process group, joined so that no rank waits without a word.

torch's own rendezvous blocks inside C++ for the timeout of the group: it names no missing rank, and signal handlers do
not run. Here each rank looks again and again, so that the log names who is missing and a stop request is obeyed. The
process group is made when all ranks are there.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import (
    PrefixStore,
    Store,
    TCPStore,
)  # torch.distributed does not declare what it exports

from ldmscale.distributed.environment import Ranks, in_slurm_step
from ldmscale.errors import ConfigError
from ldmscale.waiting import Wait

log = logging.getLogger(__name__)

LIMIT_SECONDS = 1800.0
_NAMED = 8  # missing ranks that a message names
_REQUEST_SECONDS = 60.0  # of the store, once its server is there
_CONNECT_SECONDS = 2.0
_joins = 0  # of this process so far; every rank joins as often as the others


def gather_at_store(
    ranks: Ranks,
    env: Mapping[str, str] = os.environ,
    *,
    timeout: timedelta,
    limit_seconds: float = LIMIT_SECONDS,
) -> Store:
    """The store of a new process group, once all ranks have come to it. `timeout`: of the group's later requests.

    Expects MASTER_ADDR and MASTER_PORT. Raises ConfigError if the port is taken, WaitTimeoutError if ranks are missing
    after `limit_seconds`, and StoppedEarlyError at a stop request.
    """
    global _joins
    _joins += 1
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = _open(ranks, host, port, env, limit_seconds)
    # The agent of torchrun keeps its store while ranks are started anew.
    attempt = f"{env.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joins}"
    here = PrefixStore(f"ldmscale/muster/{attempt}", store)
    _check_unique(ranks, here)
    here.add("count", 1)

    def missing() -> str:
        absent = [str(rank) for rank in range(ranks.size) if not here.check([str(rank)])]
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        return (
            f"rank {ranks.rank} of {ranks.size} is at {host}:{port}; not there: rank {', '.join(absent[:_NAMED])}{more}"
            f"{_started_by(ranks, env)}"
        )

    wait = Wait(
        missing,
        limit_seconds=limit_seconds,
        remedy="look at the logs of the missing ranks, and start all ranks anew",
    )
    pause = 0.01
    while here.add("count", 0) < ranks.size:
        wait.turn(pause)
        pause = min(2 * pause, 1.0)
    store.set_timeout(timeout)
    return PrefixStore(f"ldmscale/world/{attempt}", store)


def _check_unique(ranks: Ranks, here: Store) -> None:
    """Enter this rank. Raises ConfigError where another process has the same number, or counts other ranks: all would hang."""
    host = f"{socket.gethostname()} process {os.getpid()}"
    if (size := here.compare_set("size", "", str(ranks.size)).decode()) != str(ranks.size):
        raise ConfigError(
            f"rank {ranks.rank} on {host} was started as one of {ranks.size} ranks, and another one as one of {size}: start "
            "all ranks by one command, with one WORLD_SIZE"
        )
    if (other := here.compare_set(str(ranks.rank), "", host).decode()) != host:
        raise ConfigError(
            f"two processes are rank {ranks.rank} of {ranks.size}: {host}, and {other}: give each a RANK of its own, or start "
            "them by srun with one task for each GPU, torchrun or launch/local.sh, which number them",
            shared=False,
        )


def _open(ranks: Ranks, host: str, port: int, env: Mapping[str, str], limit_seconds: float) -> TCPStore:
    serves = ranks.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    requests = timedelta(seconds=_REQUEST_SECONDS)
    if serves:
        try:
            return TCPStore(
                host, port, ranks.size, True, timeout=requests, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            if "address already in use" not in str(error).lower():
                raise
            raise ConfigError(
                f"MASTER_PORT={port} is in use on {host}, the node of rank 0: give a free port, or end the process that uses it"
            ) from error
    last = "no try yet"
    wait = Wait(
        lambda: (
            f"rank {ranks.rank} of {ranks.size} cannot reach rank 0 at {host}:{port} ({last}){_started_by(ranks, env)}"
        ),
        limit_seconds=limit_seconds,
        remedy="is rank 0 running, and is MASTER_ADDR a name that this node can reach",
    )
    while True:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
                break
        except OSError as error:
            last = str(error)
        wait.turn(0.2)
    return TCPStore(host, port, ranks.size, False, timeout=requests, wait_for_workers=False)


def _started_by(ranks: Ranks, env: Mapping[str, str]) -> str:
    """Where the number of ranks comes from, for one who did not mean to start so many."""
    if in_slurm_step(env) and "TORCHELASTIC_RUN_ID" not in env:
        return (
            f". The {ranks.size} ranks are the tasks of Slurm step {env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}: each of "
            "them must run this command by srun; in a shell inside the step, run it as one process by "
            "`env -u SLURM_PROCID ldmscale ...`"
        )
    return f". WORLD_SIZE={env.get('WORLD_SIZE', ranks.size)} says how many ranks there are"
