"""The jobs volume between conductor (has the answers) and worker (runs the methods), and how its content is read.

    JOBS/
        worker.json  worker.lock            the worker: its environment; the file's mtime is its heartbeat
        tasks/TASK/                         one stage to run; made as .new-TASK and renamed when complete
            job.json spec.json imports/ inputs/        from the conductor
            alive (heartbeat)  cancel  done             from the conductor
            started  log.txt  status.json               from the worker: status.json says that all is over
            out/ scratch/                               the method's
        checkpoints/METHOD/STAGE/  cache/METHOD/        the method's, kept between tasks
        trash/                              what the worker is to remove

Conductor and worker are different users of one group, so folders are made with mode 2770. The conductor takes what it
finds for hostile: everything is opened below a folder that it holds open, links are never followed, sizes are capped.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from harness.contract import META, PREDICTIONS, SKIPPED, VALID_PREDICTIONS
from harness.execute.local import interrupted
from harness.execute.outcome import MAX_FILES
from harness.record import Isolation
from harness.values import Frozen

ALIVE, CANCEL, DONE, STARTED, STATUS = "alive", "cancel", "done", "started", "status.json"
NEW = ".new-"
STALE = 30.0
"""A heartbeat older than this (seconds, by the volume's own clock) means that the other side is dead."""
FOLDER_MODE, FILE_MODE = 0o2770, 0o660
FOLLOWED_BYTES = 64 << 20
MARKER = "this was a link, a FIFO or a device"
MAX_DEPTH = 32

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ONE_NAME = {PREDICTIONS, VALID_PREDICTIONS, META, SKIPPED}
"""Files that the contract refuses when they are a second name of another file."""


@dataclass(frozen=True)
class Volume:
    root: Path

    @property
    def announcement(self) -> Path:
        return self.root / "worker.json"

    @property
    def tasks(self) -> Path:
        return self.root / "tasks"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def caches(self) -> Path:
        return self.root / "cache"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    def make(self) -> None:
        """Raises OSError where the volume is missing or cannot be written."""
        for folder in (self.tasks, self.checkpoints, self.caches, self.trash):
            make_folder(folder)

    def now(self) -> float:
        """The volume's own time: heartbeats are compared with this, never with the clock of a container."""
        with tempfile.TemporaryFile(dir=self.tasks) as file:
            return os.fstat(file.fileno()).st_mtime


def make_folder(folder: Path) -> None:
    """Make a folder in which both sides can write, whatever the umask says."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(FOLDER_MODE)


def share(folder: Path) -> None:
    """Let the other side read and remove everything below a folder of ours. Links are left alone."""
    folder.chmod(FOLDER_MODE)
    for index, (_, folders, files, handle) in enumerate(os.fwalk(folder)):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):
                kind = os.lstat(name, dir_fd=handle).st_mode
                if stat.S_ISDIR(kind) or stat.S_ISREG(kind):
                    os.chmod(name, FOLDER_MODE if stat.S_ISDIR(kind) else FILE_MODE, dir_fd=handle)
        if index > 2 * MAX_FILES:
            return


class Pinned:
    """A folder held open: whatever is renamed or linked meanwhile, its names mean what is in that folder."""

    def __init__(self, folder: Path):
        self.handle = os.open(folder, _FOLDER)
        self.path = Path(f"/proc/self/fd/{self.handle}")

    def below(self, name: str) -> Pinned:
        """Raises OSError for what is no folder, a link among others."""
        return Pinned(self.path / name)

    def put(self, name: str) -> None:
        """Make an empty file, if it is not there."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE, dir_fd=self.handle))

    def has(self, name: str) -> bool:
        return self.mtime(name) is not None

    def touch(self, name: str) -> None:
        os.utime(name, dir_fd=self.handle, follow_symlinks=False)

    def mtime(self, name: str) -> float | None:
        try:
            return os.stat(name, dir_fd=self.handle, follow_symlinks=False).st_mtime
        except OSError:
            return None

    def close(self) -> None:
        os.close(self.handle)

    def __enter__(self) -> Pinned:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Follower:
    """Brings what is new in a growing file of the volume to a file of ours: the log and the curves of a run that goes on."""

    def __init__(self, folder: Pinned, name: str, target: Path):
        self._folder, self._name, self._target, self._offset = folder, name, target, 0

    def follow(self) -> bool:
        """Copy up to 1 MiB. True if there may be more."""
        above, _, name = self._name.rpartition("/")
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            folder = stack.enter_context(self._folder.below(above)) if above else self._folder
            handle = _open_regular(folder.handle, name)
            if handle is None:
                return False
            stack.callback(os.close, handle)
            data = os.pread(handle, min(1 << 20, FOLLOWED_BYTES - self._offset), self._offset)
            if data:
                with open(self._target, "ab") as target:
                    target.write(data)
                self._offset += len(data)
            return bool(data)
        return False


class TooMuch(Exception):
    """More bytes than the budget allows."""


class TreeCopy:
    """Copies regular files and folders out of a tree that somebody else wrote.

    Anything else becomes a dangling link, so that the same check that refuses it in a folder of this machine refuses it
    here. Raises TooMuch past ``most`` bytes, and OSError only for the target.
    """

    def __init__(self, most: int):
        self._left, self._entries = most, 0

    def copy(self, source: Pinned, target: Path, depth: int = 0) -> None:
        target.mkdir(exist_ok=True)
        with os.scandir(source.handle) as entries:
            for entry in entries:
                self._entries += 1
                if self._entries > 2 * MAX_FILES:
                    (target / ".too-many-files").symlink_to(MARKER)
                    return
                place = target / entry.name
                with contextlib.suppress(FileNotFoundError):
                    place.unlink()
                if entry.is_dir(follow_symlinks=False) and depth < MAX_DEPTH:
                    self._folder(source, entry.name, place, depth)
                elif (handle := _open_regular(source.handle, entry.name)) is not None:
                    with os.fdopen(handle, "rb", buffering=0) as file, open(place, "xb", buffering=0) as written:
                        self._bytes(file, written)
                else:
                    place.symlink_to(MARKER)

    def _folder(self, source: Pinned, name: str, place: Path, depth: int) -> None:
        try:
            below = Pinned(source.path / name)
        except OSError:
            place.symlink_to(MARKER)
            return
        with below:
            self.copy(below, place, depth + 1)

    def _bytes(self, source: Any, target: Any) -> None:
        while data := source.read(1 << 20):
            self._left -= len(data)
            if self._left < 0:
                raise TooMuch
            if data.count(0) == len(data):  # a hole stays a hole
                target.seek(len(data), os.SEEK_CUR)
            else:
                target.write(data)
        target.truncate()


def _open_regular(folder: int, name: str) -> int | None:
    """A file descriptor, or None for anything but a regular file that the contract lets pass."""
    try:
        if not stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode):
            return None  # before it is opened: opening a device can do things
        handle = os.open(name, _FILE, dir_fd=folder)
    except OSError:
        return None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and name in _ONE_NAME):
        os.close(handle)
        return None
    return handle


# ------------------------------------------------------------------------------------------------------- outcomes


class _Outcome(Frozen):
    """``supervise.Outcome``, read from where somebody else could have written it."""

    ended_by: Literal["exit", "deadline", "memory", "disk", "lifeline", "supervisor"]
    reason: str
    exit_code: int | None
    signal: str | None
    seconds: float
    cpu_seconds: float
    peak_memory: int
    started: float = 0.0
    isolation: Isolation | dict[str, Any]


def checked_outcome(data: bytes) -> dict[str, Any]:
    """An outcome in JSON as a plain value; one that does not look like one becomes a failure of the supervisor."""
    try:
        outcome = _Outcome.model_validate_json(data)
    except ValidationError:
        return broken("the supervisor's status cannot be read")
    level = outcome.isolation.model_dump() if isinstance(outcome.isolation, Isolation) else {}
    return outcome.model_dump() | {"isolation": level}


def broken(reason: str) -> dict[str, Any]:
    """The outcome of a run that the harness itself could not carry out."""
    return interrupted(reason) | {"ended_by": "supervisor"}
