"""What `connect` does to its process: the environment of child processes, and memory that a step frees."""

import os
import subprocess
import sys

import pytest
import torch

from ldmscale.train.engine.process import connect, disconnect

PROGRAM = """
import resource
import torch
from ldmscale.train.engine.process import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(5 << 20) for _ in range(6)]  # 20 MiB each
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages = (120 << 20) // resource.getpagesize()
freed = [faults_of_a_step() for _ in range(4)]
assert keep_freed_memory()
kept = [faults_of_a_step() for _ in range(4)]  # the first ones still grow the heap
assert freed[1] > pages / 2 and kept[-1] < pages / 100, (freed, kept)
"""


def test_child_processes_of_a_process_that_was_connected_alone_are_no_ranks() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    connect(torch.device("cpu"))
    try:
        connect(torch.device("cpu"))
        assert [os.environ[name] for name in names] == ["0", "1", "0", "1"]
    finally:
        disconnect()
    assert {name: os.environ.get(name) for name in names} == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is set on Linux only")
def test_a_step_faults_no_page_in_that_the_step_before_had() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr


GIVEN_BACK = """
import torch
from ldmscale.train.engine.process import give_back_freed_memory, keep_freed_memory

def resident_mib():
    return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0]) / 1024

assert keep_freed_memory()
shards = [torch.ones(1 << 18) for _ in range(200)]  # 1 MiB each, as a network's are
last = torch.ones(1 << 18)  # above them on the heap, so that it cannot shrink from its end
full = resident_mib()
del shards
kept = resident_mib()
assert give_back_freed_memory()
assert full - kept < 20 and full - resident_mib() > 180, (full, kept, resident_mib())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is set on Linux only")
def test_what_was_freed_for_good_goes_back_to_the_system_when_told() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
