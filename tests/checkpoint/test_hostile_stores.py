"""Stores in which someone else has written: a restore downloads what an upload writes, into the run folder alone."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.recovery import BESIDE, recover
from ldmscale.checkpoint.remote import RemoteCheckpoints
from ldmscale.checkpoint.run_folder import RunFolder
from ldmscale.checkpoint.shards import Piece
from ldmscale.errors import CheckpointError
from ldmscale.storage.object_store import Storage

CONFIG = {"job": "diffusion", "seed": 3}
LINKS = ("../../../../ESCAPED", "%2e%2e/%2e%2e/ESCAPED", "../run.json", "//host/ESCAPED", "/ESCAPED")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of two checkpoints, as a run with a tokenizer leaves it."""
    run = RunFolder(tmp_path / "before" / "run")
    run.path.mkdir(parents=True)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.tokenizer.mkdir()
    (run.tokenizer / "tokenizer.json").write_text("{}")
    (run.tokenizer / "vocab.txt").write_text("a\n")
    folder = tmp_path / "store"
    saving = CheckpointManager(run.checkpoints, url=f"file://{folder}", beside=BESIDE)
    for step in (1, 2):
        piece = Piece("net/master/w", (4,), 0, torch.full((4,), float(step)))
        saving.save(step, [piece], {"images_seen": step, "run": {"config": CONFIG, "wandb_id": "0a1b2c3d"}})
        saving.finish(uploads=True)
    shutil.rmtree(run.path)
    return folder


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


RESTORED = ["config.yaml", "metrics.jsonl", "run.json", "tokenizer/tokenizer.json", "tokenizer/vocab.txt"]


def test_a_restore_downloads_what_an_upload_writes_and_never_code(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside = store / "beside"
    planted = (
        "submissions/0001/code/start.py", "submissions/0001/job.sbatch", "submissions/0001/failures_0", "start.py",
        "config.yaml", "run.json", "lease/lease_00000009.json", "bad_nodes.txt", "checkpoints/latest",
        "tokenizer/tokenization_evil.py", "tokenizer/sub/tokenizer.json", "tokenizer/.hidden.json", "tokenizer/a\x1b[2Jb.json",
        "metrics.jsonl2", "tokenizer.json", "logs/metrics.jsonl",
    )  # fmt: skip
    for name in planted:
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        (beside / name).write_text("planted")
    (tmp_path / "secret.json").write_text("secret")
    os.symlink(tmp_path / "secret.json", beside / "classes.json")
    before = everything(tmp_path)
    folder = RunFolder(tmp_path / "run")
    recover(folder, f"file://{store}", Storage())
    assert everything(folder.path) == RESTORED
    assert [name for name in everything(tmp_path) if not name.startswith("run/")] == before
    assert folder.config() == CONFIG and folder.identity()["wandb_id"] == "0a1b2c3d"
    assert all("planted" not in path.read_text() for path in folder.path.rglob("*") if path.is_file())
    (told,) = [record for record in caplog.records if "no upload of a run writes" in record.message]
    assert f"{len(planted)} files" in told.message and told.message.isprintable()


def test_files_beyond_the_limit_stay_in_the_store(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "beside" / "metrics.jsonl").write_bytes(bytes(1000))
    got = RemoteCheckpoints(f"file://{store}").get_beside(tmp_path / "run", lambda name: True, 999)
    assert everything(tmp_path / "run") == sorted(got) == ["tokenizer/tokenizer.json", "tokenizer/vocab.txt"]
    assert "metrics.jsonl has 1000 bytes: left there" in caplog.text


def test_what_a_manifest_says_of_the_run_is_taken_where_it_is_of_its_kind(
    store: Path, tmp_path: Path
) -> None:
    for about in ([1], {"wandb_id": "../../x", "config": [1]}, {"wandb_id": 5, "config": "text"}, "text"):
        forge(store / "step_00000002", lambda values, about=about: values["state"].update(run=about))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        recover(RunFolder(tmp_path / "run"), f"file://{store}", Storage())
        assert everything(tmp_path / "run") == [n for n in RESTORED if n not in ("run.json", "config.yaml")]


def forge(checkpoint: Path, change: Any) -> None:
    """Changes a manifest, and vouches for it."""
    file = checkpoint / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    (checkpoint / "COMPLETE").write_text(xxhash.xxh3_128_hexdigest(file.read_bytes()) + "\n")


@pytest.mark.parametrize(
    "name", ["../../../../PLANTED", "../PLANTED", "{absolute}", "x/../../PLANTED", "PLANTED.py", 5]
)
def test_a_manifest_of_a_store_writes_nothing_elsewhere_and_the_checkpoint_before_is_taken(
    name: Any, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = tmp_path / "PLANTED"
    victim.write_text("of the user")
    name = str(victim) if name == "{absolute}" else name
    source = store / "step_00000002" / "rank_00000.safetensors"
    for place in ("PLANTED", "step_00000002/PLANTED.py"):
        shutil.copy(source, store / place)
    forge(store / "step_00000002", lambda values: values["files"][0].update(name=name))
    checkpoints = tmp_path / "a" / "run" / "checkpoints"
    before = [file for file in everything(tmp_path) if not file.startswith("store/starts/")]
    found = CheckpointManager(checkpoints, url=f"file://{store}").newest()
    assert found is not None and found.name == "step_00000001"
    assert "expected rank_00000.safetensors" in caplog.text
    assert victim.read_text() == "of the user"
    own = ("a/run/checkpoints/step_", "store/starts/")  # what a start writes
    assert [file for file in everything(tmp_path) if not file.startswith(own)] == before
    assert not list(checkpoints.rglob("PLANTED*"))


def test_a_file_of_another_size_than_the_manifest_says_is_not_downloaded(store: Path, tmp_path: Path) -> None:
    os.truncate(store / "step_00000002" / "rank_00000.safetensors", 1 << 20)
    found = CheckpointManager(tmp_path / "run" / "checkpoints", url=f"file://{store}").newest()
    assert found is not None and found.name == "step_00000001"
    os.truncate(store / "step_00000002" / "manifest.json", (1 << 30) + 1)
    with pytest.raises(CheckpointError, match="has 1073741825 bytes"):
        RemoteCheckpoints(f"file://{store}").manifest(2)


class Listing(SimpleHTTPRequestHandler):
    """Lists folders as web servers do, with links that lead out of each."""

    def list_directory(self, path: Any) -> BytesIO:
        names = [*sorted(entry.name + "/" * entry.is_dir() for entry in Path(path).iterdir()), *LINKS]
        page = "".join(f'<a href="{name}">x</a>\n' for name in names).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        return BytesIO(page)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def web(store: Path) -> Iterator[str]:
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: Listing(*given, directory=str(store))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_links_of_a_web_server_lead_nowhere(
    web: str, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "ESCAPED").write_text("planted")
    (store / "beside" / "start.py").write_text("planted")
    caplog.set_level(logging.WARNING)
    before = everything(tmp_path)
    folder = RunFolder(tmp_path / "a" / "b" / "c" / "run")
    recover(folder, web, Storage(patience_seconds=5.0))
    assert everything(folder.path) == RESTORED
    assert [name for name in everything(tmp_path) if not name.startswith("a/b/c/run/")] == before
    assert "no upload of a run writes" in caplog.text
