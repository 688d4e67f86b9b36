"""Secrets of a configuration are in no file that a run leaves, in no store, and in nothing that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from object_store import ObjectStore

from ldmscale.data.sources.synthetic import synthetic_shards

CHECKOUT = Path(__file__).resolve().parents[2]
TAG = "TAGSECRETMARKER"


def ldmscale(folder: Path, *arguments: str, status: int = 0, **environment: str) -> str:
    """Runs a job in `folder` and returns all that it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WANDB_"))}
    done = subprocess.run(
        [sys.executable, "-m", "ldmscale", *arguments],
        cwd=folder,
        env=clean
        | {"PYTHONPATH": str(CHECKOUT), "LDMSCALE_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu"}
        | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == status, told[-4000:]
    return told


class Ranges(SimpleHTTPRequestHandler):
    """Answers requests for ranges of files, whatever user or signature they come with."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """HOST:PORT of a web server of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def holders(folder: Path, marker: str) -> list[str]:
    """Files below `folder` that hold `marker` in their content or name."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [str(path) for path in found if marker.encode() in path.read_bytes() or marker in str(path)]


@pytest.mark.slow
def test_no_secret_is_left_by_a_run_its_resume_and_what_reports_on_it(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    made, work = tmp_path / "made", tmp_path / "work"
    work.mkdir()
    synthetic_shards(made, "images", 32, 4, 4)
    bucket = object_store.bucket("secrets")
    tars = sorted(made.glob("*.tar"))
    # Nothing in one shard can be decoded: the ledger names it.
    damaged = tars[0].read_bytes()
    for magic in (b"\x89PNG", b"\xff\xd8\xff", b"RIFF"):
        damaged = damaged.replace(magic, bytes(len(magic)))
    object_store.put("secrets", "0.tar", damaged)
    object_store.put("secrets", tars[1].name, tars[1].read_bytes())
    secrets = [object_store.secret, TAG, "PASSMARKER", "SIGNMARKER"]
    reached = (
        f"data.storage.options={{key: {object_store.key}, secret: {object_store.secret}, "
        f"config_kwargs: {{s3: {{addressing_style: path}}}}}}",
        f"data.storage.endpoint={object_store.endpoint}",
    )
    given = (
        "autoencoder", "experiment=smoke", "run.dir=runs/a", "data.workers=1", "train.global_batch=4",
        "tracking.wandb=offline", "tracking.tags=['${oc.env:MY_TAG}']", f"checkpoint.url=file://{work}/store",
        "checkpoint.save_every_steps=2", "data.max_bad_share=0.9",
    )  # fmt: skip
    shards = f"data.shards=['{bucket}/0.tar','{bucket}/{tars[1].name}']"
    told = ldmscale(work, *given, *reached, shards, "train.max_steps=2", MY_TAG=TAG)
    # The resume has its credentials from the environment and the URL, and needs none of a file.
    with serving(made) as host:
        signed = f"http://user:PASSMARKER@{host}/{tars[1].name}?X-Amz-Signature=SIGNMARKER"
        shards = f"data.shards=['{bucket}/0.tar','{signed}']"
        told += ldmscale(work, *given, shards, "train.max_steps=4", MY_TAG=TAG, **object_store.environment())
    told += ldmscale(work, "doctor", "run.dir=runs/a")
    told += ldmscale(work, "index", f"data.shards={bucket}/0.tar", "data.check=decode", *reached, status=2)
    for name in ("runs/a/config.yaml", "runs/a/data_ledger.jsonl", "store/step_00000004/manifest.json"):
        assert (work / name).stat().st_size, name
    assert list(work.glob("runs/a/wandb/offline-run*/*.wandb")) and list(work.rglob("*.idx"))
    for secret in secrets:
        assert holders(work, secret) == []
        assert secret not in told
    kept = yaml.safe_load((work / "runs/a/config.yaml").read_text())
    assert kept["tracking"]["tags"] == ["${oc.env:MY_TAG}"]
    assert kept["data"]["storage"]["options"]["secret"] == "***"
    assert kept["data"]["storage"]["options"]["config_kwargs"] == {"s3": {"addressing_style": "path"}}


def test_messages_hide_credentials_of_urls_and_of_options(tmp_path: Path) -> None:
    told = ldmscale(
        tmp_path, "index", "data.shards=http://user:PASSMARKER@127.0.0.1:9/a.tar?X-Amz-Signature=SIGNMARKER",
        "data.storage.patience_seconds=0.5", "data.storage.request_seconds=0.5", status=2,
    )  # fmt: skip
    assert "http://***@127.0.0.1:9/a.tar?***" in told
    told += ldmscale(
        tmp_path, "index", "data.shards=s3://nobody/a.tar", "data.storage.endpoint=http://127.0.0.1:9",
        "data.storage.options={key: KEYIDMARKER, secret: OPTMARKER, token: TOKENMARKER}",
        "data.storage.patience_seconds=0.5", "data.storage.request_seconds=0.5", status=2,
    )  # fmt: skip
    for marker in ("PASSMARKER", "SIGNMARKER", "OPTMARKER", "TOKENMARKER", "KEYIDMARKER"):
        assert marker not in told
        assert not list(tmp_path.rglob("*")) or holders(tmp_path, marker) == []


def test_a_submission_keeps_the_name_of_a_variable_and_refuses_a_secret(tmp_path: Path) -> None:
    given = ("submit", "index", "cluster=gpu8", "--dry-run", "data.shards=s3://b/a.tar")
    told = ldmscale(tmp_path, *given, "data.storage.options={secret: OPTMARKER}", status=2)
    assert "data.storage.options.secret holds a secret" in told and "OPTMARKER" not in told
    told = ldmscale(tmp_path, *given, "data.storage.options={secret: '${oc.env:MINE}'}", MINE="OPTMARKER")
    assert "OPTMARKER" not in told and holders(tmp_path, "OPTMARKER") == []
    (frozen,) = tmp_path.rglob("submissions/0001")
    kept = yaml.safe_load((frozen / "config.yaml").read_text())
    assert kept["data"]["storage"]["options"] == {"secret": "${oc.env:MINE}"}
    assert "MINE" in ldmscale(tmp_path, "index", "--frozen", str(frozen / "config.yaml"), status=2)


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    synthetic_shards(tmp_path / "made", "images", 32, 4, 4)
    old = os.umask(umask)
    try:
        ldmscale(tmp_path, "index", "data.shards=made")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.idx")}
    assert modes == {0o666 & ~umask}
