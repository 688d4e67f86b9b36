"""What tests of several packages share: running ldmscale as a user does."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_proxy import FaultProxy
from jobs import Host
from object_store import ObjectStore, serve

CHECKOUT = Path(__file__).resolve().parents[1]
# Set by pytest and by libraries in the process of the tests, and without effect on jobs.
SET_BY_LIBRARIES = (
    "PYTEST_CURRENT_TEST", "DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR",
    "TOKENIZERS_PARALLELISM", "WANDB_SILENT", "WANDB_SERVICE", "HYDRA_FULL_ERROR",
)  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders whose files take minutes come first, so that no worker begins a long file when the others have finished."""
    first = ("slurm", "end_to_end")
    folders = {item: item.path.relative_to(CHECKOUT / "tests").parts[0] for item in items}
    items.sort(key=lambda item: first.index(folders[item]) if folders[item] in first else len(first))


@pytest.fixture(autouse=True)
def signal_handlers_as_they_were() -> Iterator[None]:
    """A stop flag leaves its signals ignored, and children inherit that: no one could end them any more."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def host_process() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="session")
def ldmscale(host_process: Host) -> Run:
    """ldmscale(JOB, ..., cwd=PATH, ranks=N, given=TEXT): one process, or N gloo ranks; its input.

    The processes are forks of one that has imported everything (job_host.py), unless the test has changed the environment:
    then they are started as users start them. tests/launch, tests/cli and tests/slurm start processes in that way only.
    """

    def run(
        *arguments: str,
        cwd: Path,
        ranks: int | None = None,
        timeout: int = 300,
        given: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        present, before = dict(os.environ), dict(host_process.environment)
        for variables in (present, before):
            for name in SET_BY_LIBRARIES:
                variables.pop(name, None)
        if present == before:
            return host_process.completed(list(arguments), cwd, ranks, timeout, given)
        command = [sys.executable, "-m", "ldmscale", *arguments]
        if ranks is not None:
            command = [str(CHECKOUT / "launch" / "local.sh"), "-n", str(ranks), "--cpu", *arguments]
        environment = os.environ | {
            "PYTHONPATH": str(CHECKOUT),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            input=given,
        )

    return run


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server, started once for all tests that ask for it."""
    with serve(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def fault_proxy(object_store: ObjectStore) -> Iterator[FaultProxy]:
    """A door before the S3 server that injects faults; `object_store.behind(fault_proxy.endpoint)` goes through it."""
    with FaultProxy(object_store.endpoint, stall_seconds=20.0) as proxy:
        yield proxy
