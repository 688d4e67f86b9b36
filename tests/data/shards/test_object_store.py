"""The S3 server and the faulty door that other tests stand on do what those tests believe."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from fault_proxy import FaultProxy
from object_store import ObjectStore


def test_the_server_checks_keys_and_answers_ranges(object_store: ObjectStore) -> None:
    object_store.bucket("plain")
    url = object_store.put("plain", "a/b.bin", bytes(range(200)))
    fs = object_store.filesystem()
    assert fs.cat_file(url, start=10, end=14) == bytes([10, 11, 12, 13])
    assert fs.info(url)["ETag"] and fs.info(url)["size"] == 200
    stranger = ObjectStore(object_store.endpoint, "ldmscale-test", "another secret")
    with pytest.raises(PermissionError):
        stranger.filesystem().cat_file(url)


def test_the_door_injects_what_is_planned_and_then_lets_through(
    object_store: ObjectStore, fault_proxy: FaultProxy
) -> None:
    object_store.bucket("door")
    url = object_store.put("door", "x", b"0123456789")
    fault_proxy.plan = ["503", "reset", "short"]
    fs = object_store.behind(fault_proxy.endpoint).filesystem()
    assert fs.cat_file(url) == b"0123456789"  # s3fs tries again
    assert fault_proxy.injected == 3
    fault_proxy.calm()
    fault_proxy.always = "404"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{fault_proxy.endpoint}/door/x")
    fault_proxy.always, fault_proxy.stall_seconds = "stall", 0.5
    began = time.monotonic()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{fault_proxy.endpoint}/door/x")
    assert time.monotonic() - began >= 0.5
