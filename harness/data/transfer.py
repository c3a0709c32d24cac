"""One file from one address, however often the line breaks: by range, with patience, never trusting a half.

In: an address and the path of a half file (``X.jsonl.part``). Out: that file complete, and what the server said of it
(``Answer``). Beside a half file lies ``X.jsonl.part.json``: of which version of the file it is a half. The file grows by plain
appends, so the process may be killed at any moment; the next call goes on from the last byte that is on the disk.

- A half is continued only if the server still has the same version: its ETag (or Last-Modified) and its size. Else from zero.
- Tried again, with growing pauses and jitter: broken connections, silence, 408, 425, 429 and 5xx; Retry-After is obeyed. Tries are
  counted from the last time that the file got longer than ever, so a bad line is slow but a dead one ends.
- Not tried again: every other answer (403, 404, ...). The caller has another source.

``digest_of`` reads a finished file, plain or gzipped, and gives the sha256 and the size of its content without compression: a
plain file of one server and a gzipped one of another are the same file.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import json
import os
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from harness.data.source import DataError

HEAD = 1 << 20
"""How much of a file's beginning ``digest_of`` keeps to look at."""
PASSING = {408, 425, 429, *range(500, 600)}
"""Statuses that may be gone at the next try."""

Moved = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes there will be (None: nobody knows)."""


class SourceFailed(Exception):
    """This source does not give this file. ``unreachable``: it did not even answer, so it gives no other file either."""

    def __init__(self, reason: str, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class DiskFull(DataError):
    """No room for more. What has arrived stays."""


class Stopped(Exception):
    """The caller wants no more. What has arrived stays."""


class _Passing(Exception):
    """Worth another try, after at least ``wait`` seconds."""

    def __init__(self, reason: str, *, wait: float = 0.0, answered: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.answered = answered


@dataclass(frozen=True)
class Patience:
    """How long to put up with a bad line."""

    tries: int = 8
    """Tries in a row that bring nothing new."""
    first: float = 1.0
    longest: float = 60.0
    """Pauses in seconds: the first, doubled each time up to the longest; a random part of up to a half is taken off."""
    timeout: float = 30.0
    """Seconds of silence after which a connection counts as dead."""
    most: float = 900.0
    """A server that asks for a longer pause than this is not waited for."""

    def pause(self, failures: int) -> float:
        return min(self.longest, self.first * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Answer:
    """What a server said of a file. ``version``: its ETag or date; ``sha256``: the digest, where the server publishes one."""

    version: str | None
    size: int | None
    sha256: str | None = None


def open_client(patience: Patience, connections: int = 8) -> httpx2.Client:
    """A client for several threads. It asks for bytes as they lie on the server: a half must be a half of that."""
    return httpx2.Client(
        follow_redirects=True,
        timeout=httpx2.Timeout(patience.timeout, connect=min(10.0, patience.timeout)),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        headers={"Accept-Encoding": "identity", "User-Agent": "utgrec-bench"},
    )


# ---------------------------------------------------------------------------------------------------------------- asking


def ask(client: httpx2.Client, url: str) -> Answer:
    """What the server says of the file, without fetching it (HEAD). Raises SourceFailed.

    Redirects are followed by hand: the hub says all there is to know in its own answer, and the signed address behind it is
    good for GET only.
    """
    for _ in range(6):
        try:
            response = client.head(url, follow_redirects=False, timeout=10.0)
        except httpx2.ConnectError as error:
            raise SourceFailed(f"cannot be reached ({_reason(error)})", unreachable=True) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise SourceFailed(_reason(error), unreachable=isinstance(error, httpx2.TimeoutException)) from None
        answer = read_answer([response])
        if response.is_success or (response.is_redirect and answer.size is not None):
            return answer
        if not response.is_redirect or response.next_request is None:
            raise SourceFailed(_status(response))
        url = str(response.next_request.url)
    raise SourceFailed("more than five redirects")


def read_answer(responses: list[httpx2.Response]) -> Answer:
    """What a chain of answers (redirects first) says of a file. The hub's own words come before those of its stores."""
    linked = next((response for response in responses if "x-linked-etag" in response.headers), None)
    last = responses[-1]
    if linked is not None:
        tag = linked.headers["x-linked-etag"].strip('"')
        size = _number(linked.headers.get("x-linked-size"))
        return Answer(tag, _length(last) if size is None else size, tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None)
    return Answer(last.headers.get("etag") or last.headers.get("last-modified"), _length(last))


def _length(response: httpx2.Response) -> int | None:
    """Of the whole file, also where only a part is sent."""
    if response.status_code in (206, 416):
        whole = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("content-range", ""))
        return int(whole[1]) if whole else None
    return None if response.is_redirect else _number(response.headers.get("content-length"))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


# -------------------------------------------------------------------------------------------------------------- fetching


def download(
    client: httpx2.Client,
    url: str,
    part: Path,
    *,
    patience: Patience,
    stop: threading.Event,
    moved: Moved = lambda now, total: None,
    waits: Callable[[float, str], None] = lambda seconds, reason: None,
    check: Callable[[Answer], None] = lambda answer: None,
) -> Answer:
    """Fetch ``url`` to ``part``, going on from what is there. Raises SourceFailed, DiskFull, Stopped.

    ``check`` sees what the server says before the first byte is taken and may raise SourceFailed; ``waits`` hears of pauses.
    """
    failures = 0
    longest = _size(part)
    answered = False
    while True:
        try:
            return _try(client, url, part, stop, moved, check)
        except _Passing as problem:
            now = _size(part)
            failures = 1 if now > longest else failures + 1
            longest = max(longest, now)
            answered |= problem.answered
            if failures >= patience.tries or problem.wait > patience.most:
                asked = f", and asks for {problem.wait:,.0f} seconds of patience" if problem.wait > patience.most else ""
                tries = f" ({failures} tries)" if failures > 1 else ""
                raise SourceFailed(f"{problem}{asked}{tries}", unreachable=not answered) from None
            seconds = max(problem.wait, patience.pause(failures))
            waits(seconds, str(problem))
            if stop.wait(seconds):
                raise Stopped from None


def _try(client: httpx2.Client, url: str, part: Path, stop: threading.Event, moved: Moved, check: Callable[[Answer], None]) -> Answer:
    there, start = read_half(part)
    if there is not None and start == there.size:  # stopped between the last byte and its check
        with contextlib.suppress(SourceFailed):
            check(there)
            return there
        forget_half(part)
        there, start = None, 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        with client.stream("GET", url, headers=headers) as response:
            answer = read_answer([*response.history, response])
            status = response.status_code
            if status in PASSING:
                raise _Passing(_status(response), wait=retry_after(response))
            if status == 416 and start:
                raise _forget(part, "the half file does not fit what the server has now")
            if status not in (200, 206):
                raise SourceFailed(_status(response))
            if "content-encoding" in response.headers and not part.name.endswith(".gz.part"):
                raise SourceFailed(f"it compresses what was asked for uncompressed ({response.headers['content-encoding']})")
            check(answer)
            if status == 206:
                begins = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
                if answer != there or not begins or int(begins[1]) != start:
                    raise _forget(part, "the file changed on the server")
            else:
                start = 0
            return _take(response, answer, part, start, stop, moved)
    except httpx2.UnsupportedProtocol as error:
        raise SourceFailed(_reason(error)) from None
    except httpx2.TransportError as error:
        answered = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
        raise _Passing(_reason(error), answered=answered) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        raise SourceFailed(_reason(error)) from None


def _take(response: httpx2.Response, answer: Answer, part: Path, start: int, stop: threading.Event, moved: Moved) -> Answer:
    """Append the body to the half file; at ``start`` 0 the file begins anew."""
    done = start
    with writing(part):
        if not start:
            part.unlink(missing_ok=True)
            write_whole(_note(part), json.dumps(asdict(answer)) + "\n")
        with open(part, "ab", buffering=0) as file:
            for chunk in response.iter_raw():  # as they come: what a chunker holds back, a broken line loses
                if stop.is_set():
                    raise Stopped
                view = memoryview(chunk)
                while view:  # an unbuffered write may take a part
                    view = view[file.write(view) :]
                done += len(chunk)
                moved(done, answer.size)
            os.fsync(file.fileno())
    if answer.size is not None and done < answer.size:
        raise _Passing(f"the connection closed after {done:,} of {answer.size:,} bytes")
    if answer.size is not None and done > answer.size:
        raise _forget(part, f"{done:,} bytes came where {answer.size:,} were announced")
    return answer


def read_half(part: Path) -> tuple[Answer | None, int]:
    """Of which version of the file ``part`` is a half, and how long it is. (None, 0): nothing that can be continued."""
    try:
        answer = Answer(**json.loads(_note(part).read_text()))
    except (OSError, ValueError, TypeError):
        return None, 0
    size = _size(part)
    known = answer.version is not None and answer.size is not None  # else nobody can say whether the rest fits
    return (answer, size) if known and answer.size is not None and 0 < size <= answer.size else (None, 0)


def forget_half(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _forget(part: Path, why: str) -> _Passing:
    forget_half(part)
    return _Passing(f"{why}; from the start again")


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks for: a number or a date; 0 where it asks for nothing."""
    text = response.headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _status(response: httpx2.Response) -> str:
    return f"{response.status_code} {response.reason_phrase}".strip()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


# ------------------------------------------------------------------------------------------------------------- the disk


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk in words: which file, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{path}: the disk is full; free some space and run the command again: it goes on where it was") from None
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(fresh, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------------------------------------- digests


@dataclass(frozen=True)
class Content:
    """What a file holds, whatever its compression: digest, bytes, and its beginning (to look at)."""

    sha256: str
    size: int
    head: bytes


class Damaged(Exception):
    """A gzip file that is truncated or broken."""


def digest_of(path: Path, stop: threading.Event | None = None, moved: Moved = lambda now, total: None) -> Content:
    """Digest and size of the content of ``path``, decompressed if it is gzipped (by its first bytes, not by its name)."""
    digest, size, head = hashlib.sha256(), 0, b""
    total = path.stat().st_size
    with open(path, "rb") as file:
        for block in _content(file, lambda: moved(file.tell(), total), stop):
            digest.update(block)
            size += len(block)
            if len(head) < HEAD:
                head += block[: HEAD - len(head)]
    return Content(digest.hexdigest(), size, head)


def _content(file: Any, moved: Callable[[], None], stop: threading.Event | None) -> Iterator[bytes]:
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    inflate = zlib.decompressobj(31)
    while block := file.read(1 << 20):
        if stop is not None and stop.is_set():
            raise Stopped
        moved()
        if not gzipped:
            yield block
            continue
        try:
            while block:
                if inflate.eof:  # one member has ended, another begins
                    inflate = zlib.decompressobj(31)
                yield inflate.decompress(block, 1 << 22)
                block = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        except zlib.error as error:
            raise Damaged(f"the gzip file is damaged ({error})") from None
    if gzipped and not inflate.eof:
        yield inflate.flush()  # what the last call had no room for
    if gzipped and not inflate.eof:
        raise Damaged("the gzip file is truncated")
