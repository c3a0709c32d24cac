"""The worker's side of the jobs volume (``harness worker``): runs what the conductor hands over.

In: task folders below ``JOBS/tasks`` (see ``handover.py``). Out: ``status.json`` and the method's output in each of them.
Every task gets a supervisor of its own, as in a local run, and a thread that waits for it. A task ends early when its
conductor asks for that (``cancel``, ``done``) or dies (``alive`` goes stale), and when the worker is told to stop.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

from harness import isolation, provenance, supervise
from harness.contract import write_json
from harness.execute.handover import ALIVE, CANCEL, DONE, NEW, STALE, STARTED, STATUS, Volume, broken, make_folder, share
from harness.execute.local import close_lifeline, interrupted, read_outcome, start_supervisor
from harness.execute.stage import remove_tree
from harness.method import find_methods
from harness.paths import Paths
from harness.supervise import TERM_GRACE
from harness.values import ConfigError

PAUSE = 0.05
WAIT_FOR_LOCK = 30.0


def serve(jobs: Path | None = None, stale: float = STALE) -> None:
    """Run tasks until SIGTERM or SIGINT. Raises ConfigError if the volume cannot be used or another worker serves it."""
    os.umask(0o007)  # conductor and worker are of one group; nobody else is to see anything
    volume = Volume(jobs or Path(os.environ.get("HARNESS_JOBS") or "/jobs"))
    try:
        volume.make()
        lock = _lock(volume)
    except OSError as error:
        mend = "docker compose mounts it at /jobs; HARNESS_JOBS or --jobs names another folder"
        raise ConfigError(f"the jobs volume {volume.root} cannot be written by user {os.getuid()} ({error}); {mend}") from error
    Service(volume, lock, stale).run()


def _lock(volume: Volume) -> int:
    """Held by the worker and by its supervisors: a new worker waits until all that an old one started has ended."""
    handle = os.open(volume.root / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    limit = time.monotonic() + WAIT_FOR_LOCK
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > limit:
                raise ConfigError(f"another worker serves {volume.root}; end it first") from None
            time.sleep(0.1)


class Service:
    def __init__(self, volume: Volume, lock: int, stale: float):
        self.volume, self.lock, self._stale = volume, lock, stale
        self._stop = threading.Event()
        self._tasks: dict[str, RunningTask] = {}
        self.spawning = threading.Lock()
        self.supervisors: set[int] = set()
        """Process ids of supervisors that have not been waited for; changed under ``spawning``."""
        self._checkpoints: set[Path] = set()
        self._checkpoint_free = threading.Condition()
        self._garbage = threading.Event()

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        isolation.prctl(isolation.PR_SET_CHILD_SUBREAPER, 1)
        self._end_what_a_dead_worker_left()
        self._announce()
        threading.Thread(target=self._empty_trash, daemon=True).start()
        while not self._stop.is_set():
            os.utime(self.volume.announcement)
            self._look(self.volume.announcement.stat().st_mtime)
            self._stop.wait(PAUSE)
        self._shut_down()

    def _announce(self) -> None:
        paths = Paths.default()
        write_json(
            self.volume.announcement,
            {
                "level": isolation.best_level(),
                "environment": provenance.environment().model_dump(mode="json"),
                "methods": {name: method.source_hash(paths.project) for name, method in find_methods(paths, broken={}).items()},
            },
        )
        print(f"worker: ready, isolation {isolation.best_level()}, jobs in {self.volume.root}", flush=True)

    def _end_what_a_dead_worker_left(self) -> None:
        for task in self.volume.tasks.iterdir():
            if (task / STARTED).exists() and not (task / STATUS).exists():
                with contextlib.suppress(OSError):
                    write_json(task / STATUS, interrupted("the worker was started anew while this ran"))

    def _look(self, now: float) -> None:
        """Start tasks that are new, end those that nobody waits for, remove those that are done with."""
        with os.scandir(self.volume.tasks) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in names:
            folder = self.volume.tasks / name
            running = self._tasks.get(name)
            dead = now - (_mtime(folder / ALIVE) or _mtime(folder)) > self._stale
            done = dead or (folder / DONE).exists()
            if running and running.is_alive():
                if done or (folder / CANCEL).exists():
                    running.cancel("its benchmark ended" if dead else "the harness was stopped")
            elif done:
                self._tasks.pop(name, None)
                self._discard(folder)
            elif running is None and not name.startswith(NEW) and not (folder / STATUS).exists():
                self._tasks[name] = RunningTask(self, folder)
                self._tasks[name].start()

    def _discard(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            folder.rename(self.volume.trash / uuid.uuid4().hex)
            self._garbage.set()

    def _empty_trash(self) -> None:
        """In a thread of its own: removing gigabytes must not stop the heartbeat."""
        while True:
            for folder in self.volume.trash.iterdir():
                try:
                    remove_tree(folder)
                except OSError as error:
                    print(f"worker: {folder} cannot be removed: {error}", file=sys.stderr, flush=True)
            self._garbage.wait(5)
            self._garbage.clear()

    def _shut_down(self) -> None:
        for task in self._tasks.values():
            task.cancel("the worker was stopped")
        for task in self._tasks.values():
            task.join(TERM_GRACE + 10)
        self.end_orphans()
        self.volume.announcement.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------- for running tasks

    @contextlib.contextmanager
    def checkpoint(self, path: Path, task: RunningTask) -> Any:
        """Only one task at a time in a checkpoint folder: that of a dead conductor may still be ending."""
        with self._checkpoint_free:
            while path in self._checkpoints and not task.cancelled:
                self._checkpoint_free.wait(0.2)
            mine = path not in self._checkpoints
            self._checkpoints.add(path)
        try:
            yield
        finally:
            with self._checkpoint_free:
                if mine:
                    self._checkpoints.discard(path)
                self._checkpoint_free.notify_all()

    def end_orphans(self) -> None:
        """Kill what a dead supervisor has left: orphans become children of the worker, and it has no others but supervisors."""
        for _ in range(200):
            with self.spawning:
                below = set(supervise.descendants(os.getpid())) - self.supervisors
                for supervisor in self.supervisors:
                    below -= set(supervise.descendants(supervisor))
                for pid in below:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
            if not below:
                return
            time.sleep(0.02)


class RunningTask(threading.Thread):
    """One task from ``started`` to ``status.json``."""

    def __init__(self, service: Service, folder: Path):
        super().__init__(daemon=True, name=folder.name)
        self._service, self._folder = service, folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._reason = "the worker ended"
        self.cancelled = False

    def cancel(self, reason: str) -> None:
        with self._lock:
            if not self.cancelled:
                self.cancelled, self._reason = True, reason
                if self._process:
                    close_lifeline(self._process)

    def run(self) -> None:
        try:
            (self._folder / STARTED).touch()
            outcome = self._supervised()
            if outcome["ended_by"] == "lifeline" and self.cancelled:
                outcome["reason"] = self._reason
            remove_tree(self._folder / "scratch")
            share(self._folder / "out")
        except Exception:
            outcome = broken(f"the worker could not run this: {traceback.format_exc(limit=3)}")
        with contextlib.suppress(OSError):  # without a folder there is nobody to tell
            write_json(self._folder / STATUS, outcome)

    def _supervised(self) -> dict[str, Any]:
        spec = json.loads((self._folder / "spec.json").read_text())
        own = spec | {"status": str(self._folder / "supervised.json")}  # status.json comes when all is over and readable
        write_json(self._folder / "supervised-spec.json", own)
        output, cache, scratch, checkpoint = (Path(path) for path in spec["write"])
        for folder in (checkpoint.parent, checkpoint, cache, output, scratch):
            make_folder(folder)
        with self._service.checkpoint(checkpoint, self):
            process = self._start(self._folder / "supervised-spec.json")
            if process is None:
                return interrupted(self._reason)
            returncode = process.wait()
            with self._service.spawning:
                self._service.supervisors.discard(process.pid)
            with self._lock:
                close_lifeline(process)
            self._service.end_orphans()
        return read_outcome(self._folder / "supervised.json", returncode, self._folder / "supervisor.txt")

    def _start(self, spec: Path) -> subprocess.Popen[bytes] | None:
        with self._lock, self._service.spawning:
            if self.cancelled:
                return None
            self._process = start_supervisor(spec, self._folder / "supervisor.txt", self._service.lock)
            self._service.supervisors.add(self._process.pid)
            return self._process


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
