"""What img2dataset itself writes is read as it is: its own environment, its own downloads, our index and stream."""

from __future__ import annotations

import csv
import fcntl
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldmscale.data import ShardStream
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.report import check_shards
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.urls import expand

# It asks for another webdataset than ours, so it has an environment of its own: 0.8 GB, made once and kept.
WANTED = "img2dataset==1.47.0"
PACKAGES = (WANTED, "setuptools<81")


@pytest.fixture(scope="module")
def img2dataset() -> Path:
    """Its command, in an environment that is kept in the user's cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldmscale-tests" / WANTED
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        deadline = time.monotonic() + 400
        while True:  # two test runs may want it at once
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, f"another process holds {lock.name}"
                time.sleep(0.2)
        if not (folder / "complete").exists():
            subprocess.run(
                [sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True, timeout=120
            )
            install = [folder / "venv/bin/python", "-m", "pip", "install", "-q", *PACKAGES]
            done = subprocess.run(install, capture_output=True, text=True, timeout=400, check=False)
            assert done.returncode == 0, done.stderr
            (folder / "complete").touch()
    return folder / "venv/bin/img2dataset"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    handler = functools.partial(_Quiet, directory=str(tmp_path / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(60)


@pytest.mark.slow
def test_what_img2dataset_downloads_is_read_as_it_is(
    tmp_path: Path, site: str, img2dataset: Path, make_image: Callable[..., bytes]
) -> None:
    with open(tmp_path / "list.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["url", "caption", "similarity"])
        for number in range(7):
            image = make_image(60, 40 + number, seed=number, format="JPEG")
            (tmp_path / "site" / f"{number}.jpg").write_bytes(image)
            rows.writerow([f"{site}/{number}.jpg", f"caption {number} ü", number / 10])
        rows.writerow([f"{site}/gone.jpg", "nobody will see this", 0.9])
    done = subprocess.run(
        [
            img2dataset, f"--url_list={tmp_path / 'list.csv'}", "--input_format=csv", "--url_col=url",
            "--caption_col=caption", "--save_additional_columns=[similarity]", "--output_format=webdataset",
            f"--output_folder={tmp_path / 'set'}", "--number_sample_per_shard=4", "--processes_count=1",
            "--thread_count=2", "--image_size=32", "--retries=0",
        ],
        capture_output=True, text=True, check=False, timeout=180, cwd=tmp_path,
        env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "set").glob("*.parquet"))) == 2  # they lie beside the shards

    shards = expand(str(tmp_path / "set"))
    report = check_shards(shards, "decode")
    assert (len(shards), report.samples, report.damaged) == (2, 7, 0)
    stream = ShardStream(shards, seed=0, rank=0, world=1, global_batch=7)
    found = dict(itertools.islice(stream, 7))
    told = {key: json.loads(sample["json"]) for key, sample in found.items()}
    assert len(found) == 7 and all(record["key"] == key for key, record in told.items())
    for key, sample in found.items():
        number = round(told[key]["similarity"] * 10)
        assert sample["txt"].decode() == told[key]["caption"] == f"caption {number} ü"

    # Selected by its json keys, captioned from one of them.
    index = ShardIndex.open(
        shards,
        build_missing=True,
        selection=Selection(filter="similarity > 0.35 and original_width == 60 and status == 'success'"),
    )
    assert index.total == 3
    loader = Loader(
        index, ImageItem(32, seed=0, caption_source="json:caption"), seed=0, rank=0, world=1, global_batch=3,
        rank_micro_batch=3,
    )  # fmt: skip
    batch = next(loader)
    assert sorted(batch["caption"]) == [f"caption {number} ü" for number in (4, 5, 6)]
    assert batch["image"].shape == (3, 3, 32, 32)
