"""Polite download of many small files: bounded per host, retried where that may help, never where it cannot.

In: ``Job``s (an item, its URL), a function that looks at the bytes, and one that keeps what came of them. Out: one ``Result`` a job,
handed over in batches while the download runs.

- At most ``Manners.per_host`` requests of a host are under way; hosts do not wait for each other.
- Tried again, with exponential back-off and jitter: a dropped or stalled connection, a body of the wrong length, 408, 425, 429, 5xx.
- Not tried again: every other status (403, 404, 410, ...), and bytes that are no picture.
- 429, and 503 with a Retry-After, stop the whole host for that long (429 without one: for the back-off), not this request alone.
- A host that lets ``Manners.patience`` jobs fail one after the other ends the download with ``HostRefuses``: nobody is served by half
  a million requests to a host that blocks us, or that is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2

from harness.data.images import MAX_BYTES, Refused
from harness.data.source import DataError

AGENT = "utgrec-bench/0.1 (research benchmark; product pictures of Amazon Reviews 2023)"
RETRIED = {408, 425, 429, *range(500, 600)}
BATCH = 64
"""Results handed over at once, at the latest ``BATCH_SECONDS`` after the first of them: so much is fetched again after a kill."""
BATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Manners:
    """``tries`` counts the first one. ``stall``: seconds without a byte. ``deadline``: seconds for one try in all.
    ``longest_wait``: a Retry-After beyond it is not waited for. ``patience``: failures of a host in a row that end the download; a
    host that never answered at all gets ``per_host``."""

    per_host: int = 16
    tries: int = 5
    connect: float = 10.0
    stall: float = 20.0
    deadline: float = 120.0
    backoff: float = 0.5
    longest_wait: float = 600.0
    patience: int = 50


@dataclass(frozen=True, slots=True)
class Job:
    item: str
    url: str


@dataclass(frozen=True, slots=True)
class Result:
    """``data`` is what to keep, ``sent`` what the host sent (the same, unless it was re-encoded); both None for a failure."""

    job: Job
    tries: int
    data: bytes | None = None
    sent: bytes | None = None
    reason: str = ""
    detail: str = ""


class HostRefuses(DataError):
    """A host that answers nothing good. What was kept is kept."""


class Failed(Exception):
    """One try that failed. ``again``: another may not. ``wait``: seconds that the host asked for."""

    def __init__(self, reason: str, detail: str, *, again: bool, wait: float | None = None, pauses: bool = False):
        super().__init__(detail)
        self.reason, self.detail, self.again, self.wait, self.pauses = reason, detail, again, wait, pauses


@dataclass
class Host:
    """What is known of one host while the download runs."""

    name: str
    jobs: deque[Job] = field(default_factory=deque)
    resume_at: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    """By reason, since the last success."""
    answered: bool = False

    async def pause(self) -> None:
        """Until the host may be asked again; not all at the same moment."""
        while (left := self.resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0, min(1.0, 0.1 * left)))

    def judge(self, result: Result, manners: Manners) -> None:
        """Raises HostRefuses when this failure was one too many. That a picture is gone is a good answer."""
        if result.data is not None or result.reason in ("http_404", "http_410"):
            self.failures.clear()
            return
        self.failures[result.reason] += 1
        count = self.failures.total()
        if count >= (manners.patience if self.answered else min(manners.per_host, manners.patience)):
            what = ", ".join(f"{n} x {reason}" for reason, n in self.failures.most_common())
            raise HostRefuses(
                f"{self.name}: {count} pictures in a row failed ({what}; the last one: {result.detail}). What came before is kept. See "
                "whether the host can be reached and lets you in, then run the command again with --retry-failed"
            )


Look = Callable[[bytes], bytes]
"""Gives the bytes to keep, or raises Refused. Called in threads."""
Keep = Callable[[Sequence[Result]], None]
"""Takes one batch after the other."""


def fetch(jobs: Iterable[Job], look: Look, keep: Keep, manners: Manners | None = None) -> None:
    """Download all ``jobs``. Raises HostRefuses, and whatever ``keep`` raises. Ctrl-C keeps what had arrived."""
    hosts: dict[str, Host] = {}
    for job in jobs:
        name = urlsplit(job.url).netloc
        hosts.setdefault(name, Host(name)).jobs.append(job)
    if hosts:
        asyncio.run(_Download(hosts, look, keep, manners or Manners()).run())


class _Download:
    def __init__(self, hosts: dict[str, Host], look: Look, keep: Keep, manners: Manners):
        self.hosts, self.look, self.keep, self.manners = hosts, look, keep, manners
        self.arrived: list[Result] = []
        self.broken = False
        """``keep`` has raised: it is not called again."""

    async def run(self) -> None:
        # Every host has its own workers, so the client need not count connections.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30.0)
        timeout = httpx2.Timeout(self.manners.stall, connect=self.manners.connect)
        headers = {"User-Agent": AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
        client = httpx2.AsyncClient(limits=limits, timeout=timeout, headers=headers, follow_redirects=True, max_redirects=3)
        try:
            with ThreadPoolExecutor(os.cpu_count(), "look") as self.lookers, ThreadPoolExecutor(1, "keep") as self.keeper:
                async with client as self.client, asyncio.TaskGroup() as tasks:
                    worked = asyncio.Event()
                    tasks.create_task(self._hand_over_in_time(worked))
                    await asyncio.wait([tasks.create_task(self._work(host)) for host in self._places()])
                    worked.set()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:  # the keeper's thread has ended: what is left comes behind what it kept
            if self.arrived and not self.broken:
                self.keep(self.arrived)

    def _places(self) -> list[Host]:
        """One entry for every worker."""
        return [host for host in self.hosts.values() for _ in range(min(self.manners.per_host, len(host.jobs)))]

    async def _work(self, host: Host) -> None:
        while host.jobs:
            result = await self._fetch(host, host.jobs.popleft())
            self.arrived.append(result)
            host.judge(result, self.manners)
            if len(self.arrived) >= BATCH:
                await self._hand_over()

    async def _fetch(self, host: Host, job: Job) -> Result:
        """All tries of one job."""
        for tries in range(1, self.manners.tries + 1):
            await host.pause()
            try:
                async with asyncio.timeout(self.manners.deadline):
                    sent = await self._get(host, job.url)
            except Failed as failure:
                error = failure
            except TimeoutError:
                error = Failed("timeout", f"no whole answer in {self.manners.deadline:g} s", again=True)
            else:
                try:
                    data = await asyncio.get_running_loop().run_in_executor(self.lookers, self.look, sent)
                except Refused as refused:
                    return Result(job, tries, None, sent, refused.reason, str(refused))
                return Result(job, tries, data, sent)
            back_off = self.manners.backoff * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
            wait = back_off if error.wait is None else error.wait
            if not error.again or wait > self.manners.longest_wait:
                break
            if error.pauses:
                host.resume_at = max(host.resume_at, time.monotonic() + wait)
            elif tries < self.manners.tries:
                await asyncio.sleep(wait)
        return Result(job, tries, reason=error.reason, detail=error.detail)

    async def _get(self, host: Host, url: str) -> bytes:
        """One try. Raises Failed."""
        try:
            async with self.client.stream("GET", url) as answer:
                host.answered = True
                length = int(answer.headers.get("Content-Length", 0))
                if answer.status_code != 200:
                    if 0 < length < 1 << 16:
                        await answer.aread()  # so that the connection can be used again
                    raise _bad_status(answer)
                if length > MAX_BYTES:
                    raise Failed("too_large", f"{length:,} bytes announced", again=False)
                body = bytearray()
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise Failed("too_large", f"more than {MAX_BYTES:,} bytes", again=False)
                return bytes(body)
        except httpx2.TimeoutException as error:
            raise Failed("timeout", f"{type(error).__name__} after {self.manners.stall:g} s without a byte", again=True) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, ValueError) as error:
            raise Failed("bad_url", f"{type(error).__name__}: {error}", again=False) from error
        except httpx2.RemoteProtocolError as error:
            short = "complete message body" in str(error)
            raise Failed("wrong_length" if short else "connection", str(error), again=True) from error
        except httpx2.HTTPError as error:
            raise Failed("connection", f"{type(error).__name__}: {error}", again=True) from error

    async def _hand_over_in_time(self, worked: asyncio.Event) -> None:
        """Every second, and once more when all is done."""
        while not worked.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BATCH_SECONDS):
                    await worked.wait()
            await self._hand_over()

    async def _hand_over(self) -> None:
        """In a thread of its own: keeping syncs the disk."""
        batch, self.arrived = self.arrived, []
        if not batch:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self.keeper, self.keep, batch)
        except Exception:
            self.broken = True
            raise


def _bad_status(answer: httpx2.Response) -> Failed:
    status = answer.status_code
    asked = retry_after(answer.headers.get("Retry-After"))
    pauses = status == 429 or (status == 503 and asked is not None)
    detail = f"{status} {answer.reason_phrase}" + (f", Retry-After {asked:g} s" if asked is not None else "")
    return Failed(f"http_{status}", detail, again=status in RETRIED, wait=asked, pauses=pauses)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date. None where it is neither."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds())
