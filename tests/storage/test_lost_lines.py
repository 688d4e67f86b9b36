"""A full disk or a file system that stumbles costs lines, not the run. The faults are the kernel's own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldmscale.data.loading.skipped_samples import Ledger, read_ledger
from ldmscale.storage.lease import check_held, take
from ldmscale.tracking.metrics import MetricsFile

FULL = 600  # bytes that a file may have: the kernel refuses what is longer (EFBIG), as a full disk does


def _limited(work: Callable[[Path], int], folder: Path, answer: multiprocessing.SimpleQueue[int]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))
    answer.put(work(folder))


def in_full_disk(work: Callable[[Path], int], folder: Path) -> int:
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    process = fork.Process(target=_limited, args=(work, folder, answer))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return answer.get()


def _metrics(folder: Path) -> int:
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in range(40):
        metrics.write(step, {"loss/total": 0.5})
    return metrics.lost.count


def _ledger(folder: Path) -> int:
    ledger = Ledger(folder / "data_ledger.jsonl")
    for number in range(40):
        ledger.record(shard="a.tar", key=str(number), reason="cut", position=number)
    return ledger.lost.count


def test_metrics_go_on_and_what_is_there_is_whole(tmp_path: Path) -> None:
    lost = in_full_disk(_metrics, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    assert 0 < lost < 40 and len(lines) == 40 - lost
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))


def test_the_ledger_goes_on(tmp_path: Path) -> None:
    lost = in_full_disk(_ledger, tmp_path)
    assert 0 < lost < 40 and len(read_ledger(tmp_path / "data_ledger.jsonl")) >= 1


def test_losses_are_logged_at_each_doubling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger("/dev/full")
    with caplog.at_level(logging.ERROR):
        for number in range(9):
            ledger.record(shard="a.tar", key=str(number), reason="cut", position=number)
    assert ledger.lost.count == 9
    said = [record.getMessage() for record in caplog.records]
    assert [f"{n} lost so far" in line for n, line in zip((1, 2, 4, 8), said, strict=True)] == [True] * 4
    assert "No space left on device" in said[0] and "/dev/full" in said[0]


def test_skipped_samples_are_ten_lines_then_sums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    for number in range(1000):
        ledger.record(shard="a.tar", key=str(number), reason="cut", position=number)
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("skipped ") for line in said) == 10 and len(said) < 20
    assert "512 samples skipped so far" in said[-1] and len(read_ledger(ledger.path)) == 1000


# A file system that answers with an error for the files of a lease, as NFS does after a failover.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <stdarg.h>
static int bad(const char *path) { return path && strstr(path, ".lease") && getenv("FAULT") ? atoi(getenv("FAULT")) : 0; }
#define STAT(name) int name(const char *p, struct stat *s) { int e = bad(p); if (e) { errno = e; return -1; } \\
  return ((int (*)(const char *, struct stat *)) dlsym(RTLD_NEXT, #name))(p, s); }
STAT(stat)
#undef stat64
int stat64(const char *p, struct stat64 *s) { int e = bad(p); if (e) { errno = e; return -1; }
  return ((int (*)(const char *, struct stat64 *)) dlsym(RTLD_NEXT, "stat64"))(p, s); }
int open64(const char *p, int f, ...) { int e = bad(p); if (e) { errno = e; return -1; }
  va_list a; va_start(a, f); int m = va_arg(a, int); va_end(a);
  return ((int (*)(const char *, int, int)) dlsym(RTLD_NEXT, "open64"))(p, f, m); }
"""
LOOK = """
import os, sys
from pathlib import Path
from ldmscale.storage.lease import check_held
folder, number, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ["FAULT"] = fault
try:
    os.stat(folder)
    sys.exit("the shim does not work")
except OSError as error:
    assert error.errno == int(fault), error
check_held(folder, number)
print("held")
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_a_store_that_does_not_answer_takes_no_folder_away(tmp_path: Path, name: str) -> None:
    import errno

    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"], check=True
    )
    folder = tmp_path / "run.lease"
    folder.mkdir()
    lease = take(folder, timeout_seconds=60)
    assert lease is not None
    check_held(folder, lease.number)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, folder, str(lease.number), str(getattr(errno, name))],
        env=os.environ | {"LD_PRELOAD": str(tmp_path / "shim.so")}, capture_output=True, text=True,
    )  # fmt: skip
    lease.release()
    assert done.stdout == "held\n", done.stderr
