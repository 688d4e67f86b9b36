"""A door before an HTTP server that injects faults on demand: what object stores and networks do on bad days.

    with FaultProxy(store.endpoint) as proxy:
        behind = store.behind(proxy.endpoint)
        proxy.plan = ["503", "reset", "short", "stall", None]   # for the next requests, one each; None lets through
        proxy.always = "503"                                    # once the plan is used up

Faults: a status ("500", "503", "403", "404"), "reset" (the connection is cut before an answer), "short" (the
answer stops in the middle of its body), "stall" (nothing happens for `stall_seconds`, then the connection ends).
Only requests whose method and path match `only` count; the others pass.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

_HOP_BY_HOP = frozenset({"transfer-encoding", "connection", "content-length", "server", "date", "keep-alive"})
_ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>injected</Message></Error>'
_CODES = {"500": b"InternalError", "503": b"SlowDown", "403": b"AccessDenied", "404": b"NoSuchKey"}


class FaultProxy:
    """Forwards to `upstream` (http://HOST:PORT) from a free port of 127.0.0.1.

    Attributes:
        endpoint: where it answers.
        plan: faults of the next matching requests, used up from the front.
        always: the fault of every matching request after the plan; None for none.
        only: a regular expression on "METHOD PATH".
        requests: "METHOD PATH" of every matching request, in order.
        injected: number of faults so far.
    """

    def __init__(self, upstream: str, *, only: str = "^GET ", stall_seconds: float = 30.0) -> None:
        self.upstream = urlsplit(upstream)
        self.only, self.stall_seconds = only, stall_seconds
        self.plan: list[str | None] = []
        self.always: str | None = None
        self.requests: list[str] = []
        self.injected = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def calm(self) -> None:
        """No more faults; what was counted is forgotten."""
        with self._lock:
            self.plan, self.always, self.requests, self.injected = [], None, [], 0

    def next_fault(self, request: str) -> str | None:
        if not re.search(self.only, request):
            return None
        with self._lock:
            self.requests.append(request)
            fault = self.plan.pop(0) if self.plan else self.always
            self.injected += fault is not None
        return fault

    def stall(self) -> None:
        self._closing.wait(self.stall_seconds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.owner.next_fault(f"{self.command} {self.path}")
        if fault in _CODES:
            self.answer(int(fault), _ERROR % _CODES[fault])
        elif fault in ("reset", "stall"):
            if fault == "stall":
                self.owner.stall()
            self.cut()
        else:
            self.relay(body, short=fault == "short")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def relay(self, body: bytes, *, short: bool) -> None:
        upstream = http.client.HTTPConnection(self.owner.upstream.hostname or "", self.owner.upstream.port)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is part of the signature
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            length = answer.getheader("content-length") if self.command == "HEAD" else str(len(data))
            self.send_header("content-length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if short else data)
            if short:
                self.wfile.flush()
                self.cut()
        finally:
            upstream.close()

    def answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has gone already
            self.connection.shutdown(socket.SHUT_RDWR)
