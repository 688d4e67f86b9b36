"""Files of the hub: the local cache is used first, the network for what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldmscale.storage.hub import cached_first

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; from ldmscale.storage.hub import hub_file; print(hub_file('owner/name', sys.argv[1]))"


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server that has no file: its URL, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD = refuse

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_a_file_in_the_cache_is_not_asked_for_and_another_one_is(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    endpoint, asked = hub
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    done = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, name],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for name in ("config.json", "other.json")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert Path(done[0].stdout.strip()).read_text() == "{}"
    assert done[1].returncode != 0
    assert {path for path in asked if "/resolve/" in path} == {"/owner/name/resolve/main/other.json"}


def test_only_a_missing_local_copy_leads_to_the_network() -> None:
    asked: list[bool] = []

    def load(local: bool) -> int:
        asked.append(local)
        if local:
            raise FileNotFoundError
        return 7

    assert cached_first(load) == 7 and asked == [True, False]
    with pytest.raises(ValueError):
        cached_first(lambda local: int("no number"))
