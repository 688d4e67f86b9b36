"""Shards in a real S3 store behind a faulty door: what passes is survived, what does not ends in one clear error."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from fault_proxy import FaultProxy
from object_store import ObjectStore

from ldmscale.data import ShardStream
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.skipped_samples import Ledger, read_ledger
from ldmscale.data.loading.training_data import next_for_all
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.report import check_shards
from ldmscale.data.shards.urls import expand
from ldmscale.errors import DataError
from ldmscale.storage.object_store import Storage, StoreError

WriteShards = Callable[..., list[str]]
Local = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def stored(
    object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory, write_shards: WriteShards
) -> Local:
    """The same shards on the disk and in the store."""
    paths = write_shards(tmp_path_factory.mktemp("shards"), [6, 5, 7])
    object_store.bucket("laion")
    return paths, [object_store.put("laion", f"a/{Path(p).name}", Path(p).read_bytes()) for p in paths]


def through(store: ObjectStore, proxy: FaultProxy | None = None, **limits: float) -> Storage:
    options = store.options()
    del options["client_kwargs"]["endpoint_url"]
    return Storage(options, proxy.endpoint if proxy else store.endpoint, **limits)


def keys(shards: list[str], storage: Storage | None, steps: int = 12) -> list[str]:
    stream = ShardStream(shards, seed=4, rank=0, world=1, global_batch=3, storage=storage)
    return [key for key, _ in itertools.islice(stream, 3 * steps)]


def test_a_store_gives_the_same_samples_in_the_same_order_as_a_disk(
    object_store: ObjectStore, stored: Local
) -> None:
    paths, urls = stored
    storage = through(object_store)
    assert expand("s3://laion/a/*.tar", storage=storage) == urls
    assert expand("s3://laion/a/{00000..00002}.tar") == urls
    report = check_shards(urls, "decode", storage=storage)
    assert (report.samples, report.damaged) == (18, 0)
    assert keys(urls, storage) == keys(paths, None)
    index = ShardIndex.open(urls, storage=storage)
    loader = Loader(
        index, ImageItem(8, seed=0), seed=4, rank=0, world=1, global_batch=3, rank_micro_batch=3, workers=1
    )
    found = [key for _ in range(4) for key in next_for_all(loader)["key"]]
    loader.close()
    assert found == keys(paths, None, 4)  # forked workers read, too


def test_only_new_and_changed_objects_are_looked_through(object_store: ObjectStore, stored: Local) -> None:
    paths, _ = stored
    storage = through(object_store)
    first = [object_store.put("laion", f"growing/{Path(p).name}", Path(p).read_bytes()) for p in paths[:2]]
    assert check_shards(first, storage=storage).looked_through == 2
    every = [*first, object_store.put("laion", "growing/00002.tar", Path(paths[2]).read_bytes())]
    assert check_shards(every, storage=storage).looked_through == 1
    index = ShardIndex.open(every, storage=storage)
    object_store.put("laion", "growing/00000.tar", Path(paths[2]).read_bytes())  # another ETag
    with pytest.raises(DataError, match="changed since it was indexed") as caught:
        ShardIndex.open(every, storage=storage, build_missing=True)
    assert f"ldmscale index data.shards={every[0]}" in str(caught.value) and index.total == 18


@pytest.mark.parametrize("plan", [["503"] * 4, ["reset"] * 4, ["short"] * 4, ["stall", None, "short", "503"]])
def test_bad_days_of_the_store_are_survived(
    object_store: ObjectStore, fault_proxy: FaultProxy, stored: Local, plan: list[str | None]
) -> None:
    paths, urls = stored
    storage = through(object_store, fault_proxy, request_seconds=1.0, patience_seconds=60.0)
    index = ShardIndex.open(urls, build_missing=True, storage=storage)
    reader, plain = SampleReader(index), SampleReader(ShardIndex.open(paths, build_missing=True))
    fault_proxy.plan = list(plan)
    for shard, number in ((0, 5), (2, 1), (1, 0)):
        assert reader.read(shard, number).members == plain.read(shard, number).members
    assert fault_proxy.injected == sum(fault is not None for fault in plan)


@pytest.mark.parametrize("fault", ["503", "reset", "stall"])
def test_a_store_that_stays_away_ends_in_time_with_the_remedy(
    object_store: ObjectStore, fault_proxy: FaultProxy, stored: Local, fault: str, tmp_path: Path
) -> None:
    _, urls = stored
    storage = through(object_store, fault_proxy, request_seconds=0.5, patience_seconds=1.0)
    made = ShardIndex.open(urls, build_missing=True, storage=through(object_store, fault_proxy))
    index = ShardIndex(made.path, storage)
    fault_proxy.always, fault_proxy.only = fault, r"^GET .*\.tar"
    ledger = tmp_path / "ledger.jsonl"
    loader = Loader(
        index,
        ImageItem(8, seed=0),
        seed=4,
        rank=0,
        world=1,
        global_batch=3,
        rank_micro_batch=3,
        ledger=Ledger(ledger),
    )
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"no success in 1 s.*start the same command again"):
        next(loader)
    assert time.monotonic() - began < 100.0  # patience and one try more, on any machine
    assert read_ledger(ledger) == []  # no sample is to blame: nothing was replaced
    fault_proxy.calm()
    assert next(loader)["key"] == keys(urls, storage, 1)  # and nothing was skipped


def test_refused_access_and_absent_objects_are_told_at_once(
    object_store: ObjectStore, stored: Local, tmp_path: Path
) -> None:
    _, urls = stored
    stranger = Storage({"key": "nobody", "secret": "nothing"}, object_store.endpoint)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"refuses access.*credentials"):
        ShardIndex.open(urls, storage=stranger)
    absent = "s3://laion/a/00009.tar"
    with pytest.raises(DataError, match=r"00009\.tar cannot be found"):
        ShardIndex.open([*urls, absent], storage=through(object_store))
    assert time.monotonic() - began < 100.0  # patience would be 120 s


def test_a_store_that_stays_away_is_waited_for_once_and_not_for_each_shard(
    object_store: ObjectStore, fault_proxy: FaultProxy, stored: Local
) -> None:
    _, urls = stored
    fault_proxy.always = "503"
    with pytest.raises(StoreError, match=r"s3://laion/a: no success in 1 s"):  # the listing already
        ShardIndex.open(urls, storage=through(object_store, fault_proxy, patience_seconds=1.0))
    with pytest.raises(DataError, match=r"foo://host/b\.tar cannot be read: Protocol not known") as caught:
        expand("foo://host/{a,b}.tar")
    assert len(caught.value.faults) == 1


def test_an_object_that_vanishes_is_replaced_and_written_down(
    object_store: ObjectStore, stored: Local, tmp_path: Path
) -> None:
    paths, _ = stored
    urls = [object_store.put("laion", f"leaving/{Path(p).name}", Path(p).read_bytes()) for p in paths]
    storage = through(object_store)
    index = ShardIndex.open(urls, build_missing=True, storage=storage)
    object_store.filesystem().rm_file(urls[1])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    stream = ShardStream(index, seed=4, rank=0, world=1, global_batch=3, ledger=ledger)
    assert len([key for key, _ in itertools.islice(stream, 18)]) == 18
    entries = read_ledger(tmp_path / "ledger.jsonl")
    assert {entry["shard"] for entry in entries} == {urls[1]} and len(entries) >= 5
    assert all("no such object" in entry["reason"] for entry in entries)


class _Ranges(SimpleHTTPRequestHandler):
    """Python's file server, with the ranges that it lacks."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        try:
            data = Path(self.translate_path(self.path)).read_bytes()
        except FileNotFoundError:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        start, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(start) : int(last) + 1 if last else None]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def web(stored: Local) -> Iterator[str]:
    folder = str(Path(stored[0][0]).parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: _Ranges(*given, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(60)


def test_shards_are_read_from_a_web_server(web: str, stored: Local) -> None:
    paths, _ = stored
    urls = expand(f"{web}/{{00000..00002}}.tar")
    assert keys(urls, Storage()) == keys(paths, None)
    with pytest.raises(DataError, match=r"9\.tar cannot be found: .*no such object"):
        ShardIndex.open([*urls, f"{web}/9.tar"])
    # A web server says when a file changed, where it has no ETag.
    os.utime(paths[1], ns=(10**18, 10**18))
    with pytest.raises(DataError, match=r"00001\.tar changed since it was indexed"):
        ShardIndex.open(urls)


def test_a_web_server_that_is_down_has_not_lost_its_files() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.tar"  # bound, and nobody listens
        with pytest.raises(StoreError, match=r"no success in 0\.5 s"):
            ShardIndex.open([url], storage=Storage(patience_seconds=0.5))


def test_ldmscale_index_and_doctor_take_the_endpoint_from_the_command_line(
    object_store: ObjectStore,
    stored: Local,
    ldmscale: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    environment = {
        name: value for name, value in object_store.environment().items() if "ENDPOINT" not in name
    }
    for name, value in environment.items():
        os.environ[name] = value
    try:
        done = ldmscale(
            "index",
            "data.shards=s3://laion/a/*.tar",
            f"data.storage.endpoint={object_store.endpoint}",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        text = done.stdout + done.stderr
        assert json.loads(text[text.index("{") : text.rindex("}") + 1])["samples"] == 18
        done = ldmscale(
            "doctor", "doctor.shards=s3://laion/a/*.tar", "doctor.measure_mib=1",
            "doctor.storage.endpoint=http://127.0.0.1:9", "doctor.storage.patience_seconds=1", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2 and "no success in 1 s" in done.stderr
    finally:
        for name in environment:
            del os.environ[name]


def test_waits_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = iter([OSError("one"), OSError("two"), "value"])

    def work() -> str:
        found = next(outcomes)
        if isinstance(found, OSError):
            raise found
        return found

    with caplog.at_level(logging.WARNING):
        assert Storage().persist(work, "what") == "value"
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "what: OSError: one",
        "what: OSError: two",
    ]
