"""Jobs on forked ranks (job_host.py) and a small first stage for several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Host


@pytest.fixture
def host(host_process: Host, tmp_path: Path) -> Iterator[Host]:
    host_process.folder = tmp_path
    yield host_process
    host_process.clear()


class Place:
    """A folder with a tiny autoencoder "ae" and its images, in which jobs run as a user would start them."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder

    def run(self, *command: str, ranks: int = 1) -> None:
        """A job that must end well."""
        self.host.folder = self.folder
        self.host.finish(list(command), self.folder / "keys.jsonl", ranks=ranks)

    @property
    def log(self) -> str:
        self.host.folder = self.folder
        return self.host.log


@pytest.fixture(scope="session")
def small_place(host_process: Host, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One first stage for the tasks of several files."""
    place = Place(host_process, tmp_path_factory.mktemp("tasks"))
    place.run(
        "autoencoder", "experiment=smoke", "run.dir=ae", "train.max_steps=2", "train.rank_micro_batch=8"
    )
    return place
