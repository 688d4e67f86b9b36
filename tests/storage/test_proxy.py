"""Shards behind http:// where only a proxy reaches the world, as on many compute nodes: a real proxy on this machine."""

import http.server
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from ldmscale.storage.object_store import Storage, StoreError

BODY = bytes(range(256)) * 8
URL = "http://data.example.invalid/00000.tar"  # .invalid resolves nowhere (RFC 2606)


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)  # a proxy is asked for the whole URL
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = BODY[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(BODY)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Proxy]]:
    class Proxy(_Proxy):
        asked: ClassVar[list[str]] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        yield Proxy
        server.shutdown()
        thread.join()


def test_shards_behind_http_are_read_through_the_proxy_of_the_environment(proxy):
    assert Storage(patience_seconds=5).read(URL, 100, 300) == BODY[100:300]
    assert proxy.asked == [URL]


@pytest.mark.parametrize("way", ["no_proxy", "options"])
def test_no_proxy_and_options_go_past_the_proxy(proxy, monkeypatch, way):
    options = {"client_kwargs": {"trust_env": False}} if way == "options" else {}
    if way == "no_proxy":
        monkeypatch.setenv("no_proxy", "example.invalid")
    with pytest.raises(StoreError):
        Storage(options=options, patience_seconds=0.1).read(URL, 0, 10)
    assert not proxy.asked


def test_the_message_names_the_proxy_that_a_request_went_through(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://me:geheim@127.0.0.1:9")  # the port of `discard`: nothing listens
    with pytest.raises(
        StoreError, match=r"through the proxy of http_proxy; no_proxy=data\.example\.invalid"
    ) as caught:
        Storage(patience_seconds=0.1).read(URL, 0, 10)
    assert "geheim" not in str(caught.value)


def test_the_message_says_where_no_proxy_is_set(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StoreError, match="http_proxy is not set"):
        Storage(patience_seconds=0.1).read(URL, 0, 10)
