"""Starts any job on all devices of this node: one process a rank, without torchrun and without torch.

`python -m ldmscale.launcher [-n N] [--cpu] JOB [overrides...]`; launch/local.sh is the door for shells. Why not
torchrun: it turns every status of a rank into 1, and dies of SIGUSR1 without its ranks. Here the status of
the job is the status of its ranks (0, 2, 75, ...), signals reach every rank, and a dying rank ends the
others.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from ldmscale.distributed.environment import LAUNCHER, PARTED, have_parted
from ldmscale.distributed.preemption import Interruptible, StopSignal
from ldmscale.errors import ConfigError
from ldmscale.waiting import Wait, WaitTimeoutError, finished

log = logging.getLogger(__name__)

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FAULTY, _STOPPED = 2, 75
# Seconds that the other ranks have to end by themselves after one ended with this status. Ranks agree on 2
# and on 75, and rank 0 may still be bringing W&B or a checkpoint to an end; after any other status they wait
# in vain for the dead.
_PATIENCE = {_FAULTY: 30.0, _STOPPED: 300.0}
_PATIENCE_AFTER_FAILURE = 5.0
_PATIENCE_TO_PART = 15.0
_SECONDS_TO_TERMINATE = 10.0
_POLL_SECONDS = 0.05
# Jobs whose ranks part (`distributed.environment`), and redo what a dead one has left.
_INDEPENDENT = ("latents",)


def launch(
    arguments: Sequence[str], ranks: int | None = None, *, cpu: bool = False, deliver: bool = False
) -> int:
    """Run `ldmscale ARGUMENTS...` on `ranks` processes of this node (None: one a GPU, or one) and return the
    exit status.

    The status is that of the first rank that failed; 2 or 75 if ranks ended so and none failed; else 0.
    `deliver`: a signal that reached the ranks reaches the caller's own handler too, once they have ended.
    Raises ConfigError if there are fewer GPUs than ranks.
    """
    gpus = 0 if cpu else count_gpus()
    count = ranks if ranks is not None else max(gpus, 1)
    if count < 1:
        raise ConfigError(f"{count} ranks were asked for: give at least 1.")
    if gpus and count > gpus:
        raise ConfigError(
            f"{count} ranks were asked for, but this node shows {gpus} GPU(s): "
            f"give -n {gpus}, or --cpu to use none."
        )
    return run_ranks(
        [sys.executable, "-m", "ldmscale", *arguments],
        shared_environment(os.environ, count, gpus),
        count,
        independent=next(iter(arguments), "") in _INDEPENDENT,
        deliver=deliver,
    )


def run_ranks(
    command: Sequence[str],
    env: Mapping[str, str],
    count: int,
    *,
    independent: bool = False,
    deliver: bool = False,
) -> int:
    """Run `command` as ranks 0 to count-1 with `env` and return the status of the job (see `launch`).

    Where ranks are `independent` a failed one ends no other that has parted from it, and the status is 0 as soon as one
    ended with 0.
    Main thread only: SIGTERM, SIGINT and SIGUSR1 are passed on to all ranks until they have ended.
    """
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_all(processes, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    with tempfile.TemporaryDirectory(prefix="ldmscale_ranks_") if independent else nullcontext() as folder:
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), LAUNCHER: str(os.getpid())}
                own |= {} if folder is None else {PARTED: folder}
                # Rank 0 alone reads standard input (prompts, for instance).
                stdin = None if rank == 0 else subprocess.DEVNULL
                processes.append(
                    subprocess.Popen(command, env={**env, **own}, stdin=stdin, preexec_fn=_end_with_parent())
                )
            for number in received:  # which came before all ranks were there
                _signal_all(processes, number)
            return _wait(processes, None if folder is None else Path(folder), received)
        finally:
            _signal_all(processes, signal.SIGKILL)
            for process in processes:
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
            if deliver and received:
                signal.raise_signal(received[0])


def count_gpus(env: Mapping[str, str] = os.environ) -> int:
    """GPUs that a job started here would use; 0 with the CPU build of torch and where DS_ACCELERATOR=cpu."""
    if env.get("DS_ACCELERATOR") == "cpu" or _torch_version().endswith("+cpu"):
        return 0
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return 0
    try:
        listing = finished([smi, "-L"], cause="nvidia-smi -L, which lists the GPUs", limit_seconds=60.0)
    except WaitTimeoutError as error:
        raise ConfigError(
            f"{error}: the driver of the GPUs hangs (`dmesg` says more); restart the node, or give --cpu to use no GPU"
        ) from None
    if listing.returncode != 0:
        return 0
    return visible_gpus(listing.stdout.decode("utf-8", "replace"), env.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(listing: str, visible: str | None) -> int:
    """Devices that CUDA shows, as its programming guide defines CUDA_VISIBLE_DEVICES.

    The list ends at its first entry that names no device, and one that names a device twice shows none. Of MIG instances a
    process sees one at most.

    Args:
        listing: output of `nvidia-smi -L`.
        visible: CUDA_VISIBLE_DEVICES; None: not set.
    """
    gpus = [
        uuid or number
        for number, uuid in re.findall(r"^GPU (\d+):(?:.*\(UUID: ([^)]*)\))?", listing, re.MULTILINE)
    ]
    instances = re.findall(r"^\s+MIG .*?\(UUID: ([^)]*)\)", listing, re.MULTILINE)
    if visible is None:
        return min(1, len(gpus)) if instances else len(gpus)
    shown: list[str] = []
    for entry in visible.split(","):
        device = _device_named(entry.strip(), gpus, instances)
        if device is None:
            break
        if device in shown:
            return 0
        shown.append(device)
    return min(1, len(shown)) if instances else len(shown)


def _device_named(entry: str, gpus: Sequence[str], instances: Sequence[str]) -> str | None:
    """The UUID of the device that an entry names: by its number, or by the beginning of its UUID if that is unique."""
    if re.fullmatch(r"\d+", entry):
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-GPU-"):  # of older drivers: MIG-<UUID of the GPU>/<instance>/<instance>
        return entry if instances else None
    among = instances if entry.startswith("MIG-") else gpus
    named = [uuid for uuid in among if uuid.startswith(entry)] if entry.startswith(("GPU-", "MIG-")) else []
    return named[0] if len(named) == 1 else None


def shared_environment(env: Mapping[str, str], ranks: int, gpus: int) -> dict[str, str]:
    """`env` with what all ranks of this node share: rendezvous, threads, device, where ldmscale is."""
    # A job started by torchrun may start another one here, whose ranks must not ask torchrun's agent.
    shared = {name: value for name, value in env.items() if not name.startswith("TORCHELASTIC_")}
    shared |= {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shared.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    if not gpus:
        shared["DS_ACCELERATOR"] = "cpu"
    # gloo would connect to the address of the host's name, which a laptop's firewall or VPN may not let
    # through.
    if Path("/sys/class/net/lo").exists():
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Ranks must find the same ldmscale as this process does, also in a checkout that is not installed.
    home = str(Path(__file__).resolve().parents[1])
    if not home.endswith("site-packages"):
        shared["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [env.get("PYTHONPATH")])])
    return shared


def free_port() -> int:
    """A port that is free now, and likely to stay so: it lies below those that the kernel hands out."""
    for port in random.sample(range(10_000, 20_000), 200):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("none of 200 ports between 10000 and 20000 is free on this node")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the launcher; what follows JOB is passed on untouched."""
    parser = argparse.ArgumentParser(
        prog="launch/local.sh",
        usage="launch/local.sh [-n N] [--cpu] JOB [overrides ...]",
        description="Runs a job of ldmscale on all devices of this node and ends with the job's exit status.",
    )
    parser.add_argument(
        "-n", dest="ranks", type=int, metavar="N", help="ranks; one a GPU, or 1 without GPUs, unless given"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU (gloo ranks on the CPU)")
    parser.add_argument("job", metavar="JOB", help="see ldmscale --help")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="passed to the job as they are")
    given = parser.parse_args(arguments)
    only_asks = any(word in ("-h", "--help", "--cfg", "-c", "--info") for word in given.overrides)
    if importlib.util.find_spec("hydra") is None:
        sys.stderr.write(
            f"launch/local.sh: {sys.executable} lacks the packages that ldmscale needs: "
            "run `make install` in the checkout, or name another Python by PYTHON=...\n"
        )
        return _FAULTY
    with Interruptible():
        try:
            return launch([given.job, *given.overrides], 1 if only_asks else given.ranks, cpu=given.cpu)
        except ConfigError as error:
            sys.stderr.write("".join(f"launch/local.sh: {fault}\n" for fault in error.faults))
            return _FAULTY
        except StopSignal as stop:
            log.warning("interrupted by %s before a rank had started: the same command starts them", stop)
            return _STOPPED


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], parted: Path | None, received: Sequence[int] = ()
) -> int:
    """Wait for all ranks; once one has failed, end those that may wait for it. Returns the job's status.

    `parted`: where ranks tell that they wait for no other (`distributed.environment`); None: they always do.
    `received`: signals that were passed on so far.
    """
    ended: dict[int, int] = {}  # rank: status, of ranks that ended by themselves, in this order
    deadline: float | None = None
    terminated = False
    stopping: Wait | None = None
    while True:
        running = [rank for rank, process in enumerate(processes) if process.poll() is None]
        alone = parted is not None and have_parted(parted, running)
        if alone and deadline is not None and not terminated:
            log.warning("none waits for it any more: the others go on")
            deadline = None
        if not terminated:
            for rank, process in enumerate(processes):
                status = process.returncode
                if status is None or rank in ended:
                    continue
                ended[rank] = status if status >= 0 else 128 - status
                if ended[rank] != 0 and not alone:
                    usual = _PATIENCE_AFTER_FAILURE if parted is None else _PATIENCE_TO_PART
                    patience = _PATIENCE.get(ended[rank], usual)
                    deadline = min(deadline or float("inf"), time.monotonic() + patience)
                if running and ended[rank] not in (0, *_PATIENCE):
                    others = "the others go on" if alone else "those that wait for it are ended too"
                    log.error("rank %d ended with status %d; %s", rank, ended[rank], others)
        if not running:
            if parted is not None and 0 in ended.values():
                return 0
            return _job_status(list(ended.values()))
        if deadline is not None and time.monotonic() > deadline:
            _signal_all(processes, signal.SIGKILL if terminated else signal.SIGTERM)
            terminated, deadline = True, time.monotonic() + _SECONDS_TO_TERMINATE
        if received:
            # They save; how long that may take is for the one who signals to say. A second signal is passed on as well.
            stopping = stopping or Wait(
                lambda: _still_there(processes), limit_seconds=math.inf, obeys_stop=False
            )
            stopping.check()
        time.sleep(_POLL_SECONDS)


def _still_there(processes: Sequence[subprocess.Popen[bytes]]) -> str:
    ranks = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
    return f"rank {', '.join(ranks)}, asked to stop; training ranks save first"


def _job_status(statuses: Sequence[int]) -> int:
    """The first true failure, else 2, else 75, else 0: 75 promises a complete save by all ranks."""
    failed = [status for status in statuses if status not in (0, _FAULTY, _STOPPED)]
    if failed:
        return failed[0]
    return next((status for status in (_FAULTY, _STOPPED) if status in statuses), 0)


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _end_with_parent() -> Callable[[], None] | None:
    """What a new rank does before it starts: ask the kernel for SIGTERM should the launcher be killed (Linux
    only).
    """
    if sys.platform != "linux":
        return None
    set_death_signal = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        # A batch script may ignore it, and so would its ranks until they have their own handlers.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        set_death_signal(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return ask


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main())
