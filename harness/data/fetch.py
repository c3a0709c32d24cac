"""Fetch the files of Amazon Reviews 2023: from the official hub at a pinned revision, else from the official mirror.

In: categories and parts. Out: files in the layout that the preparation reads, each checked, none half-written:

    RAW/review_categories/CATEGORY.jsonl[.gz]                        part "reviews"
    RAW/meta_categories/meta_CATEGORY.jsonl[.gz]                     part "meta"
    RAW/benchmark/5core/last_out/CATEGORY.{train,valid,test}.csv[.gz]   part "5core"
    RAW/amazon2023.lock.json                                         digests of what was seen (pins.py)
    RAW/.fetch.json, RAW/.fetch.lock, *.part, *.part.json            what was checked already; the lock; halves

The hub serves plain files, the mirror gzipped ones; what is compared is the content. A file gets its final name after its
content has the digest of the lock file, or else of the hub, or else (and then it is written down) after a look at its first
line: a login page of a proxy is no review. Files of one folder are fetched several at a time by one process; a second process
waits for the first and then finds everything there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness.data.pins import FIRST_SEEN, Pin, Pins
from harness.data.release import DATASET, LOCK, REVISION, Source, Wanted, first_line_problem, sources
from harness.data.source import DataError
from harness.data.transfer import (
    Answer,
    Content,
    Damaged,
    DiskFull,
    Patience,
    SourceFailed,
    ask,
    digest_of,
    download,
    forget_half,
    open_client,
    read_half,
    sync_folder,
    write_whole,
    writing,
)

State = Literal["there", "at hand", "half", "missing"]


@dataclass(frozen=True)
class Planned:
    """What there is of a file. ``size``: bytes that ``source`` serves; ``done``: how many of them are here."""

    wanted: Wanted
    state: State
    path: Path | None = None
    size: int | None = None
    done: int = 0
    source: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Fetched:
    wanted: Wanted
    path: Path
    how: Literal["there", "fetched", "linked"]
    size: int
    source: str = ""
    checked: bool = True
    """False: it was checked by an earlier call and has not changed since."""


class Show:
    """What happens, for whoever wants to see it. Called from several threads."""

    def note(self, text: str) -> None: ...
    def planned(self, plan: Sequence[Planned]) -> None: ...
    def moved(self, wanted: Wanted, what: str, now: int, total: int | None) -> None: ...
    def waits(self, wanted: Wanted, seconds: float, reason: str) -> None: ...
    def done(self, fetched: Fetched) -> None: ...
    def failed(self, wanted: Wanted, reason: str) -> None: ...


class Fetch:
    """One call: these files, into this folder, from these servers. A context manager, good for one ``run``."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        folder: Path,
        servers: Sequence[Source] | None = None,
        *,
        raw: Path | None = None,
        parallel: int = 4,
        verify: bool = False,
        patience: Patience | None = None,
        show: Show | None = None,
        lock: Path = LOCK,
    ) -> None:
        self.wanted = list(wanted)
        self.folder = folder.absolute()
        self.servers = sources() if servers is None else list(servers)
        self.raw = raw
        self.parallel = max(1, parallel)
        self.verify = verify
        self.patience = patience or Patience()
        self.show = show or Show()
        self.lock = lock
        self.pins = self._read_pins()
        self.client = open_client(self.patience, 2 * self.parallel)
        self.stop = threading.Event()
        self._silent: dict[str, str] = {}
        self._receipts_lock = threading.Lock()
        self._receipts: dict[str, list[Any]] = {}
        if raw is not None and not raw.is_dir():
            raise DataError(f"{raw} is no folder")

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.client.close()

    def _read_pins(self) -> Pins:
        return Pins(DATASET, REVISION, self.lock, self.folder / LOCK.name)

    # ------------------------------------------------------------------------------------------------------------ plan

    def plan(self) -> list[Planned]:
        """What is there and what would be fetched. Asks the servers for sizes; writes nothing."""
        with ThreadPoolExecutor(max(8, self.parallel)) as pool:
            return list(pool.map(self._plan_one, self.wanted))

    def _plan_one(self, wanted: Wanted) -> Planned:
        if path := self._find(wanted):
            return Planned(wanted, "there", path, path.stat().st_size)
        if self.raw is not None and (path := self._at_hand(wanted)):
            return Planned(wanted, "at hand", path, path.stat().st_size)
        halves = {source.name: read_half(source.part(self.folder, wanted))[1] for source in self.servers}
        problems: list[str] = []
        for source in self.servers:
            try:
                answer = self._ask(source, wanted)
            except SourceFailed as failure:
                problems.append(f"{source.name}: {failure}")
                continue
            done = halves[source.name]
            return Planned(wanted, "half" if done else "missing", None, answer.size, done, source.name, "; ".join(problems))
        pin, done = self.pins[wanted.path], max(halves.values(), default=0)
        size = pin.size if pin else None
        return Planned(wanted, "half" if done else "missing", None, size, done, problem="; ".join(problems) or "no server is left")

    def _ask(self, source: Source, wanted: Wanted) -> Answer:
        """Without patience: a server that does not answer one question is asked no other."""
        if silent := self._silent.get(source.name):
            raise SourceFailed(silent)
        try:
            return ask(self.client, source.url(wanted))
        except SourceFailed as failure:
            if failure.unreachable:
                self._silent[source.name] = str(failure)
            raise

    def _find(self, wanted: Wanted) -> Path | None:
        """The file under its final name."""
        return next((path for suffix in ("", ".gz") if (path := self.folder / (wanted.local + suffix)).exists()), None)

    def _at_hand(self, wanted: Wanted) -> Path | None:
        """The file in the folder that the user named, by the names that people give it."""
        assert self.raw is not None
        names = (wanted.local, wanted.path, Path(wanted.path).name)
        return next((path for name in names for suffix in ("", ".gz") if (path := self.raw / (name + suffix)).is_file()), None)

    # ----------------------------------------------------------------------------------------------------------- fetch

    def run(self) -> list[Fetched]:
        """Fetch what is missing, check everything. Raises DataError; whatever it raises, what has arrived stays."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.pins = self._read_pins()  # another process may have learned
            self._receipts = self._read_receipts()
            plan = self.plan()
            self.show.planned(plan)
            self._check_space(plan)
            return self._all(sorted(plan, key=lambda entry: -(entry.size if entry.size is not None else 1 << 60)))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process a folder. The lock goes with the process, however it ends."""
        with contextlib.ExitStack() as stack:
            with writing(self.folder / ".fetch.lock"):
                lock = stack.enter_context(open(self.folder / ".fetch.lock", "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.show.note(f"another fetch is at work in {self.folder}: waiting for it")
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check_space(self, plan: Sequence[Planned]) -> None:
        todo = [entry for entry in plan if entry.state in ("missing", "half")]
        needed = sum(entry.size - entry.done for entry in todo if entry.size is not None)
        free = free_space(self.folder)
        if needed > free:
            raise DiskFull(
                f"{self.folder} has {in_words(free)} free, but {len(todo)} files need {in_words(needed)} more: free some space, name"
                " another folder with --to, or fetch fewer categories or parts. Nothing was fetched"
            )

    def _all(self, plan: Sequence[Planned]) -> list[Fetched]:
        """All files, ``parallel`` at a time. The first thing that concerns all of them (a full disk, Ctrl-C) stops the rest."""
        todo: queue.SimpleQueue[Planned] = queue.SimpleQueue()
        for entry in plan:
            todo.put(entry)
        ended: queue.SimpleQueue[tuple[Planned, Fetched | BaseException]] = queue.SimpleQueue()

        def work() -> None:
            while not self.stop.is_set():
                try:
                    entry = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    ended.put((entry, self._one(entry)))
                except BaseException as error:  # given to the caller below
                    ended.put((entry, error))

        # daemons: a process that is told to end must not wait for a server that is silent
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.parallel, len(plan)))]
        fetched: list[Fetched] = []
        failures: list[str] = []
        try:
            for thread in threads:
                thread.start()
            for _ in plan:
                entry, outcome = ended.get()
                if isinstance(outcome, Fetched):
                    fetched.append(outcome)
                    self.show.done(outcome)
                elif isinstance(outcome, DataError) and not isinstance(outcome, DiskFull):
                    failures.append(f"{entry.wanted.path}: {outcome}")
                    self.show.failed(entry.wanted, str(outcome))
                else:
                    raise outcome
        finally:
            self.stop.set()
            self.client.close()
            patience = time.monotonic() + 1.0
            for thread in threads:
                thread.join(max(0.0, patience - time.monotonic()))
        if failures:
            lines = "".join(f"\n  {line}" for line in sorted(failures))
            raise DataError(
                f"{len(failures)} of {len(plan)} files are missing; the others are in {self.folder}, and the same command goes on:{lines}"
            )
        order = {wanted: place for place, wanted in enumerate(self.wanted)}
        return sorted(fetched, key=lambda entry: order[entry.wanted])

    def _one(self, planned: Planned) -> Fetched:
        wanted = planned.wanted
        if path := self._find(wanted):
            return self._there(wanted, path)
        if planned.state == "at hand" and planned.path is not None:
            return self._link(wanted, planned.path)
        problems = []
        for source in sorted(self.servers, key=lambda source: source.name in self._silent):  # who was silent to the plan comes last
            if source.down:
                problems.append(f"{source.name}: {source.down}")
                continue
            try:
                return self._from(source, wanted)
            except SourceFailed as failure:
                problems.append(source.failed(failure))
        raise DataError("; ".join(problems) or "it is not here, and no server is left to ask")

    def _from(self, source: Source, wanted: Wanted) -> Fetched:
        """From one server: half file, check, final name."""
        part = source.part(self.folder, wanted)
        with writing(part):
            part.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            pieced = read_half(part)[1] > 0
            pauses: list[float] = []

            def waits(seconds: float, reason: str, pauses: list[float] = pauses) -> None:
                pauses.append(seconds)
                self.show.waits(wanted, seconds, f"{source.name}: {reason}")

            answer = download(
                self.client,
                source.url(wanted),
                part,
                patience=self.patience,
                stop=self.stop,
                moved=lambda now, total: self.show.moved(wanted, source.name, now, total),
                waits=waits,
                check=lambda answer: self._check_answer(source, wanted, answer),
            )
            pin = self.pins[wanted.path] or (Pin(answer.sha256, answer.size, "the hub") if answer.sha256 else None)
            try:
                content = self._content(wanted, part, pin, whole=answer.size is not None)
            except _Wrong as wrong:
                forget_half(part)
                if attempt == 1 and (pieced or pauses):  # a seam may be bad: a crash of the machine, a proxy
                    self.show.waits(wanted, 0.0, f"{source.name}: {wrong}; from the start again")
                    continue
                raise SourceFailed(str(wrong)) from None
            seen = "the hub" if answer.sha256 else f"{FIRST_SEEN} at the {source.name}"
            return self._keep(wanted, part, content, source.suffix, seen, Fetched(wanted, part, "fetched", 0, source.name))
        raise AssertionError

    def _check_answer(self, source: Source, wanted: Wanted, answer: Answer) -> None:
        """Refuse before the first byte what cannot be right."""
        pin = self.pins[wanted.path]
        if pin is None:
            return
        if answer.sha256 not in (None, pin.sha256):
            raise SourceFailed(self._other(f"sha256 {answer.sha256}", pin.sha256, pin))
        if not source.suffix and None not in (pin.size, answer.size) and pin.size != answer.size:
            raise SourceFailed(self._other(f"{answer.size} bytes", str(pin.size), pin))

    def _there(self, wanted: Wanted, path: Path) -> Fetched:
        """A file under its final name: checked now, or before and unchanged since."""
        status, pin = path.stat(), self.pins[wanted.path]
        receipt = [status.st_size, status.st_mtime_ns]
        known = self._receipts.get(path.relative_to(self.folder).as_posix(), [])
        if not self.verify and pin is not None and known == [*receipt, pin.sha256]:
            return Fetched(wanted, path, "there", status.st_size, checked=False)
        try:
            content = self._content(wanted, path, pin := pin or self._hubs_pin(wanted))
        except _Wrong as wrong:
            raise DataError(f"{path} is there, but {wrong}; move it away and run the command again") from None
        seen = pin.seen if pin else f"{FIRST_SEEN} in the folder"
        return self._keep(wanted, path, content, None, seen, Fetched(wanted, path, "there", status.st_size))

    def _link(self, wanted: Wanted, path: Path) -> Fetched:
        """A file that the user has: checked where it is, then linked into the folder."""
        pin = self.pins[wanted.path] or self._hubs_pin(wanted)
        try:
            content = self._content(wanted, path, pin)
        except _Wrong as wrong:
            raise DataError(f"{path} cannot be taken: {wrong}; take it out of {self.raw}, and it is downloaded") from None
        with open(path, "rb") as file:
            suffix = ".gz" if file.read(2) == b"\x1f\x8b" else ""
        part = self.folder / f"{wanted.local}{suffix}.link"
        with writing(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            try:
                os.link(path.resolve(), part)
            except OSError:  # another file system
                part.symlink_to(path.resolve())
        seen = pin.seen if pin else f"{FIRST_SEEN} in --raw"
        return self._keep(wanted, part, content, suffix, seen, Fetched(wanted, part, "linked", 0))

    def _hubs_pin(self, wanted: Wanted) -> Pin | None:
        """What the hub says that the file must be, if it can be asked."""
        for source in self.servers:
            if not source.suffix:
                try:
                    answer = self._ask(source, wanted)
                except SourceFailed:
                    continue
                if answer.sha256:
                    return Pin(answer.sha256, answer.size, "the hub")
        return None

    def _content(self, wanted: Wanted, path: Path, pin: Pin | None, *, whole: bool = True) -> Content:
        """Digest and size of what ``path`` holds, if it is the file. Raises _Wrong.

        ``whole``: its length was announced, so that nothing can be missing at its end.
        """
        try:
            content = digest_of(path, self.stop, lambda now, total: self.show.moved(wanted, "checking", now, total))
        except Damaged as damage:
            raise _Wrong(str(damage)) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        if problem := first_line_problem(wanted, content.head):
            raise _Wrong(problem)
        if pin is None:
            if not whole and path.name.endswith(".part") and not path.name.endswith(".gz.part"):
                raise _Wrong("nobody says how long the file is, nor what its digest must be: it may be cut short")
            return content
        if content.sha256 != pin.sha256:
            raise _Wrong(self._other(f"sha256 {content.sha256}", pin.sha256, pin))
        return content

    def _other(self, found: str, expected: str, pin: Pin) -> str:
        mend = f"; if that was wrong, take its entry out of {self.pins.beside}" if pin.seen.startswith(FIRST_SEEN) else ""
        return f"it is another file ({found}, expected {expected}: {pin.seen}{mend})"

    def _keep(self, wanted: Wanted, path: Path, content: Content, suffix: str | None, seen: str, fetched: Fetched) -> Fetched:
        """Write down the digest, give the file its final name (``suffix`` None: it has it), clear the halves."""
        self.pins.learn(wanted.path, Pin(content.sha256, content.size, seen))
        final = path if suffix is None else self.folder / (wanted.local + suffix)
        with writing(final):
            if final != path:
                os.replace(path, final)
                sync_folder(final.parent)
            status = final.stat()
            with self._receipts_lock:
                self._receipts[final.relative_to(self.folder).as_posix()] = [status.st_size, status.st_mtime_ns, content.sha256]
                write_whole(self.folder / ".fetch.json", json.dumps(self._receipts, indent=1) + "\n")
            for source in self.servers:
                forget_half(source.part(self.folder, wanted))
        return replace(fetched, path=final, size=status.st_size)

    def _read_receipts(self) -> dict[str, list[Any]]:
        with contextlib.suppress(OSError, ValueError):
            raw = json.loads((self.folder / ".fetch.json").read_text())
            return raw if isinstance(raw, dict) else {}
        return {}


class _Wrong(Exception):
    """The content is not that of the file."""


def free_space(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def in_words(size: int | None) -> str:
    """1.56 GB, as the hub writes it; unknown for None."""
    if size is None:
        return "unknown"
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"
