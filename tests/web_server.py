"""A web server for tests: it plays the hub, the mirror and the picture host, well and badly.

In: what each path serves and how its answers go wrong, one fault a request. Out: real answers over a real socket of 127.0.0.1,
a log of all requests, and how many were under way at once.

    def test_x(web_server):
        web_server.serve("/a.jpg", picture, faults=[Status(429, retry_after="1"), Drop(after=100)])
        ...fetch(web_server.url("/a.jpg"))...            # first 429, then a dropped connection, then the picture
        assert [entry.status for entry in web_server.log] == [429, 200, 206]

Paths that nobody named are 404. Ranges, If-Range, ETag, HEAD, 416 and keep-alive are as real servers have them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest


@dataclass(frozen=True)
class Fault:
    """One answer that goes wrong. It is spent on a request whose method it names; HEAD requests pass it by unless it says so."""

    methods: tuple[str, ...] = field(default=("GET",), kw_only=True)


@dataclass(frozen=True)
class Status(Fault):
    """An answer with this status and a short text: 403, 404, 429, 500, 503, ..."""

    status: int
    retry_after: str | None = None
    body: bytes = b"no\n"


@dataclass(frozen=True)
class Drop(Fault):
    """Promise the whole body, close the connection after this many bytes of it (``reset``: with a TCP reset)."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class Stall(Fault):
    """Send this many bytes of the body, then nothing for so many seconds (or until the server stops), then close."""

    after: int
    seconds: float = 600.0


@dataclass(frozen=True)
class Length(Fault):
    """Say that the body has this length, send the real one, close."""

    length: int


@dataclass(frozen=True)
class Content(Fault):
    """Another body than the right one, in good order (``etag``: the right one's stays, as with a poisoned cache)."""

    body: bytes


@dataclass(frozen=True)
class Slow(Fault):
    """The right body, this many bytes a second."""

    pace: float


@dataclass
class Page:
    body: bytes
    faults: list[Fault]
    always: Fault | None
    etag: str | None
    ranges: bool
    length: bool
    delay: float | None
    pace: float | None
    headers: dict[str, str]
    redirect: str | None


@dataclass
class Request:
    """One request and what came of it: in the log from the moment its answer begins. ``sent``: bytes of the body so far."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int
    started: float


class WebServer:
    """The server. A context manager; the fixture ``web_server`` is one that runs."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        """Seconds before every answer, for paths without a delay of their own."""
        self.pages: dict[str, Page] = {}
        self.log: list[Request] = []
        self.now = 0
        self.busiest = 0
        """The most requests under way at once, from their first line to the last byte of the answer."""
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"web": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def serve(
        self,
        path: str,
        body: bytes,
        *,
        faults: Sequence[Fault] = (),
        always: Fault | None = None,
        etag: str | None = "",
        ranges: bool = True,
        length: bool = True,
        delay: float | None = None,
        pace: float | None = None,
        headers: dict[str, str] | None = None,
        redirect: str | None = None,
    ) -> None:
        """What ``path`` answers from now on.

        ``faults`` are spent one a request, ``always`` goes wrong each time. ``etag``: "" makes one from the body, None sends none.
        ``length=False`` sends no Content-Length. ``pace``: bytes a second. ``redirect``: a 302 to there, with ``headers``.
        """
        tag = f'"{hashlib.md5(body).hexdigest()}"' if etag == "" else etag
        self.pages[path] = Page(body, list(faults), always, tag, ranges, length, delay, pace, headers or {}, redirect)

    def requests(self, path: str | None = None, method: str | None = None) -> list[Request]:
        """The log, of one path or method."""
        with self.lock:
            return [entry for entry in self.log if path in (None, entry.path) and method in (None, entry.method)]


@pytest.fixture
def web_server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what many tests do on purpose."""


class _Handler(BaseHTTPRequestHandler):
    web: ClassVar[WebServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self) -> None:
        web = self.web
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.entry = Request(self.command, self._path(), headers, 0, 0, time.monotonic())
        with web.lock:
            web.now += 1
            web.busiest = max(web.busiest, web.now)
        try:
            self._serve()
            self.wfile.flush()
        except OSError:  # the client went away
            self.close_connection = True
        finally:
            with web.lock:
                web.now -= 1

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _serve(self) -> None:
        page = self.web.pages.get(self._path())
        delay = self.web.delay if page is None or page.delay is None else page.delay
        if delay:
            self.web.stopping.wait(delay)
        if page is None:
            return self._head(404, 3, body=b"no\n")
        fault = self._fault(page)
        if isinstance(fault, Status):
            more = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            return self._head(fault.status, len(fault.body), more, body=fault.body)
        if page.redirect:
            return self._head(302, 0, {"Location": page.redirect, **page.headers})
        body = fault.body if isinstance(fault, Content) else page.body
        start, end, status = self._range(page, len(body))
        headers = dict(page.headers)
        if page.etag:
            headers["ETag"] = page.etag
        if page.ranges:
            headers["Accept-Ranges"] = "bytes"
        if status == 416:
            return self._head(416, 0, {**headers, "Content-Range": f"bytes */{len(body)}"})
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        length: int | None = end - start
        if isinstance(fault, Length):
            length, self.close_connection = fault.length, True
        elif not page.length:
            length, self.close_connection = None, True
        self._head(status, length, headers)
        if self.command != "HEAD":
            self._send(body[start:end], fault, fault.pace if isinstance(fault, Slow) else page.pace)

    def _fault(self, page: Page) -> Fault | None:
        with self.web.lock:
            for place, fault in enumerate(page.faults):
                if self.command in fault.methods:
                    return page.faults.pop(place)
        return page.always if page.always and self.command in page.always.methods else None

    def _range(self, page: Page, size: int) -> tuple[int, int, int]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not page.ranges or self.headers.get("If-Range", page.etag) != page.etag:
            return 0, size, 200
        start, end = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
        return (start, end, 206) if start < end else (0, 0, 416)

    def _head(self, status: int, length: int | None, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.entry.status = status
        with self.web.lock:
            self.web.log.append(self.entry)
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if body and self.command != "HEAD":
            self._write(body)

    def _send(self, data: bytes, fault: Fault | None, pace: float | None) -> None:
        stop = min(len(data), fault.after) if isinstance(fault, Drop | Stall) else len(data)
        step = max(1, int(pace / 50)) if pace else 1 << 18
        for start in range(0, stop, step):
            self._write(data[start : min(start + step, stop)])
            if pace:
                self.wfile.flush()
                if self.web.stopping.wait(step / pace):
                    break
        if isinstance(fault, Stall):
            self.wfile.flush()
            self.web.stopping.wait(fault.seconds)
        if isinstance(fault, Drop | Stall):
            self.wfile.flush()
            self.close_connection = True
            if isinstance(fault, Drop) and fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _write(self, data: bytes) -> None:
        self.entry.sent += len(data)  # first: a client must not see the bytes before a test sees the number
        self.wfile.write(data)
