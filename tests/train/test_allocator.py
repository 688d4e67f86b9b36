"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from ldmscale.train.allocator import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 20) for _ in range(32)]  # 4 MiB each
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults = [faults_of_a_step() for _ in range(3)]
pages = (128 << 20) // resource.getpagesize()
assert faults[0] > pages / 2 or faults[0] > 32, faults  # huge pages: fewer
assert max(faults[1:]) < pages / 100, faults
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is set on Linux only")
def test_a_step_faults_no_page_in_that_the_step_before_had() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
