"""Limits of a node that loading processes would meet late, or in silence: /dev/shm, descriptors, paths of sockets.

Checked before the first process is started. A batch travels from a loading process in a file of /dev/shm, whose descriptor
is sent through a socket below TMPDIR.
"""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_LONGEST_SOCKET = 107  # bytes of a path that sun_path holds (unix(7)), less its end
# What Python's multiprocessing adds to the folder: "/pymp-" and "/listener-", with eight characters each.
_ADDED_TO_FOLDER = len("/pymp-abcdefgh/listener-abcdefgh")
_TENSORS_OF_BATCH = 8  # each is a descriptor here for as long as its batch lives
_OF_WORKER = 8  # descriptors of pipes and queues
_OF_RANK = 2  # of the connections to another rank
_OF_PROCESS = 256  # libraries, logs, shards, devices
_IN_FLIGHT = 2  # batches of a loading process beyond those prepared: in the making, and in use


def shared_memory_faults(
    batch_bytes: int, *, workers: int, prefetch: int, local_ranks: int, folder: Path = SHARED_MEMORY
) -> list[str]:
    """Fault of a shared memory that cannot hold the batches in flight of all ranks of this node; empty where it can."""
    if not workers or not folder.is_dir():
        return []
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    each = batch_bytes * (prefetch + _IN_FLIGHT) * local_ranks
    if each * workers <= free:
        return []
    most = int(free // each)
    return [
        f"{folder} has {_mib(free)} free, but data.workers={workers} on {local_ranks} rank(s) of this node, with "
        f"{prefetch + _IN_FLIGHT} batches of {_mib(batch_bytes)} each, need {_mib(each * workers)}: give it more room "
        f"(docker run --shm-size={-(-each * workers // 2**30)}g, or --ipc=host), or data.workers={most}"
    ]


def descriptor_faults(*, workers: int, prefetch: int, ranks: int) -> list[str]:
    """Raise the soft limit on open files as far as it goes; a fault if that is not enough for this rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = (
        _OF_PROCESS + _OF_RANK * ranks + workers * (_OF_WORKER + (prefetch + _IN_FLIGHT) * _TENSORS_OF_BATCH)
    )
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and (hard == unlimited or soft < hard):
        wanted = max(soft, needed) if hard == unlimited else hard
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):
            pass  # some systems allow less than they say
    if soft == unlimited or needed <= soft:
        return []
    return [
        f"this process may open {soft} files (`ulimit -n`), but data.workers={workers} and {ranks} rank(s) need {needed}: raise "
        f"the hard limit (`ulimit -Hn`, /etc/security/limits.conf, LimitNOFILE= of a service, docker run --ulimit "
        f"nofile={needed}), or give fewer data.workers"
    ]


def socket_faults(*, workers: int) -> list[str]:
    """Fault of a temporary folder whose path is too long for the sockets of loading processes."""
    folder = tempfile.gettempdir()
    needed = len(os.fsencode(folder)) + _ADDED_TO_FOLDER
    if not workers or needed <= _LONGEST_SOCKET:
        return []
    return [
        f"the temporary folder {folder} makes paths of sockets {needed} bytes long, and the system takes {_LONGEST_SOCKET}: "
        f"set TMPDIR to a path of at most {_LONGEST_SOCKET - _ADDED_TO_FOLDER} bytes, such as TMPDIR=/tmp, or data.workers=0"
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
