"""The MLflow server: find the configured one, or start a local one of our own.

In: the results folder. Out: ``Server`` with its address. ``MLFLOW_TRACKING_URI`` names a configured server (http or https).
Otherwise a local one runs on SQLite with its own artifact folder, all in ``RESULTS/mlflow``, on 127.0.0.1.

How long the local server lives is decided by locks, which the kernel takes back from a process however it ends:

- every harness that uses the server holds ``users.lock`` (shared);
- a keeper process, in a session of its own, holds ``keeper.lock`` for its life. It is started by whoever gets that lock
  first, so two harnesses start one server. It runs the server and, when it can have ``users.lock`` alone, nobody uses the
  server any more: it ends the server's whole process group and itself.

So nothing is left behind by ``kill -9`` of a harness, and a second harness keeps using the server when the first one ends.
This file is also the keeper's program, and needs the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

START_TIMEOUT = 240.0
"""Seconds for a local server to answer: 8 when the machine is idle, over 80 seen on a busy one."""
REACH_TIMEOUT = 10.0
"""Seconds for a configured server to answer."""
FIRST_PORT = 5000
NICE = 5
DATABASE = "mlflow.db"


class ServerError(Exception):
    """No server can be had. The message says why and what to do."""


@dataclass
class Server:
    """A server in use. ``local``: ours, and it ends when its last user closes it; ``started``: by this call."""

    uri: str
    local: bool = False
    started: bool = False
    _lock: int | None = None

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def configured() -> str | None:
    """The address in ``MLFLOW_TRACKING_URI``, or None. Raises ServerError if it is not one of a server."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return None
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(
            f"MLFLOW_TRACKING_URI is {uri!r}, but the harness talks to a server over http or https. "
            "Unset it and the harness starts one on SQLite by itself, or start one on that store "
            f"(mlflow server --backend-store-uri {uri} --artifacts-destination FOLDER) and set MLFLOW_TRACKING_URI=http://127.0.0.1:5000"
        )
    return uri


def without_password(uri: str) -> str:
    """The address as it may be shown and written down."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "") + parts.path.rstrip("/")


def ensure(results: Path, timeout: float | None = None, cancelled: Callable[[], bool] = lambda: False, *, polite: bool = False) -> Server:
    """The configured server, or a local one for this results folder, started if need be. Raises ServerError.

    ``polite``: one that is started now runs with low priority, because timed runs are running beside it.
    """
    if uri := configured():
        _await_configured(uri, REACH_TIMEOUT if timeout is None else timeout, cancelled)
        return Server(uri)
    return _ensure_local(results / "mlflow", START_TIMEOUT if timeout is None else timeout, cancelled, NICE if polite else 0)


def ui(results: Path, say: Callable[[str], None] = print) -> None:
    """Keep the server running in the foreground, its address printed and opened, until Ctrl-C."""
    server = ensure(results)
    try:
        say(f"MLflow: {server.uri}" + ("   (Ctrl-C ends it)" if server.local else ""))
        if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin":
            webbrowser.open(server.uri)
        while server.local and answers(server.uri):
            time.sleep(2.0)
    except KeyboardInterrupt:
        pass
    finally:
        server.close()


def answers(uri: str, timeout: float = 5.0) -> bool:
    """Whether an HTTP server answers there at all."""
    return _health(uri, timeout) is not None


def _health(uri: str, timeout: float) -> int | None:
    parts = urlsplit(uri)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _await_configured(uri: str, timeout: float, cancelled: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout
    while not answers(uri):
        if time.monotonic() > deadline or cancelled():
            raise ServerError(f"the MLflow server at {without_password(uri)} (MLFLOW_TRACKING_URI) does not answer")
        time.sleep(0.5)


# --------------------------------------------------------------------------------------------------- the local server


def _ensure_local(folder: Path, timeout: float, cancelled: Callable[[], bool], nice: int) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    users = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _lock(users, fcntl.LOCK_SH):  # held alone only by a keeper that is ending
            _wait(deadline, cancelled, folder)
        started = False
        while True:
            keeper = os.open(folder / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if _lock(keeper, fcntl.LOCK_EX):
                    if started:
                        raise ServerError(f"the MLflow server did not start; {_last_words(folder)}")
                    started = True
                    _start_keeper(folder, keeper, nice)
            finally:
                os.close(keeper)
            uri = _read_state(folder)
            if uri and answers(uri):
                return Server(uri, local=True, started=started, _lock=users)
            _wait(deadline, cancelled, folder)
    except BaseException:
        os.close(users)
        raise


def _wait(deadline: float, cancelled: Callable[[], bool], folder: Path) -> None:
    if cancelled():
        raise ServerError("the start of the MLflow server was given up")
    if time.monotonic() > deadline:
        raise ServerError(f"the MLflow server does not answer; {_last_words(folder)}")
    time.sleep(0.2)


def _start_keeper(folder: Path, lock: int, nice: int) -> None:
    """Start the keeper, which inherits the lock: there is no moment at which another harness could take it."""
    (folder / "server.json").unlink(missing_ok=True)
    with open(folder / "server.log", "wb") as log:
        subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), str(folder.resolve()), str(nice)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            pass_fds=(lock,),
            start_new_session=True,
        )


def _read_state(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "server.json").read_text())["uri"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_words(folder: Path) -> str:
    path = folder / "server.log"
    try:
        return f"its last words ({path}):\n{path.read_text(errors='replace')[-2000:]}"
    except OSError:
        return f"it left no word in {path}"


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------- the keeper


def keep(folder: Path) -> int:
    """The keeper: run the server until nobody uses it."""
    users = os.open(folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    _end_orphan(folder)
    server: subprocess.Popen[bytes] | None = None
    try:
        port, ready = 0, False
        while not _lock(users, fcntl.LOCK_EX):
            if server is None:
                port = _free_port(port + 1 if port else FIRST_PORT)
                server = _start_server(folder, port)
                _write_state(folder / "process.json", {"group": server.pid})
            elif server.poll() is not None:
                if ready or not _taken(port):
                    return 1
                server = None  # somebody took the port between our look and the server's: try the next one
            elif not ready and answers(f"http://127.0.0.1:{port}", timeout=2.0) and _listens(server.pid, port):
                ready = True
                _write_state(folder / "server.json", {"uri": f"http://127.0.0.1:{port}", "pid": server.pid})
            time.sleep(0.25)
        return 0
    finally:
        (folder / "server.json").unlink(missing_ok=True)
        if server is not None:
            _end_group(server)
        (folder / "process.json").unlink(missing_ok=True)


def _start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """One worker; no job execution (it costs 2 GB); no telemetry; no access log (it is a third of the work)."""
    environment = {name: value for name, value in os.environ.items() if not name.lstrip("_").startswith("MLFLOW_")}
    environment |= {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",
    }
    # A write-ahead log halves the time of a write, which is mostly waiting for the disk. The setting stays in the file.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(folder / DATABASE)) as database:
        database.execute("pragma journal_mode = wal")
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / DATABASE}", "--artifacts-destination", str(folder / "artifacts")]
    command += ["--uvicorn-opts", "--log-level warning --no-access-log"]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, cwd=folder, env=environment, start_new_session=True, preexec_fn=_end_with_parent
    )


def _end_with_parent() -> None:
    """For the case that the keeper itself is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end_group(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(5.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _end_orphan(folder: Path) -> None:
    """End what a killed keeper left: the process group that it noted, if a process of MLflow is still in it."""
    try:
        group = int(json.loads((folder / "process.json").read_text())["group"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    for entry in _members(group):
        with contextlib.suppress(OSError):
            if b"mlflow" in (entry / "cmdline").read_bytes():
                os.killpg(group, signal.SIGKILL)
                return


def _members(group: int) -> Iterator[Path]:
    """The processes of a group, as folders of ``/proc``."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                yield entry


def _listens(group: int, port: int) -> bool:
    """Whether the port is this process group's. While our server starts, somebody else's can take the port, and would answer for it.

    True where the system does not tell (no ``/proc``).
    """
    try:
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return True
    listening = {f"socket:[{fields[9]}]" for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")}
    for entry in _members(group):
        with contextlib.suppress(OSError):
            if any(os.readlink(handle) in listening for handle in (entry / "fd").iterdir()):
                return True
    return False


def _write_state(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state))
    os.replace(temporary, path)


def _free_port(first: int) -> int:
    for port in range(first, first + 500):
        if not _taken(port):
            return port
    raise ServerError(f"no free port in {first}..{first + 499}")


def _taken(port: int) -> bool:
    """Whether somebody listens there, on this address or on all of them."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


if __name__ == "__main__":
    os.nice(int(sys.argv[2]))
    sys.exit(keep(Path(sys.argv[1])))
