"""One small supervisor a run: spawn, isolate, deadline, memory and disk watch, signals. It always leaves a status.

In: ``spec.json`` (see ``Spec``) as the only argument, and standard input as the life line: when the harness dies or
closes it, the run is ended and its status is ``interrupted``. Out: the method's log (capped) and ``status.json``.

The process tree, where namespaces are to be had: supervisor -> first process of a PID namespace (reaps, ends with the
method, takes everything with it) -> method. Else the supervisor is the reaper of all orphans below it and ends them one
by one. Standard library only, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import isolation

TERM_GRACE = 5.0
"""Seconds between SIGTERM, on which a method may save its checkpoint, and SIGKILL."""
LOG_LIMIT = 32 << 20
DRAIN_READS = 64
ORPHAN_MARK = "HARNESS_RUN"


@dataclass(frozen=True)
class Spec:
    """What to run and within which limits. All paths are absolute; ``status`` and ``log`` lie outside ``write``."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    log: str
    status: str
    read: list[str]
    write: list[str]
    deadline: float
    memory: int
    disk: int
    isolation: str = "auto"
    term_grace: float = TERM_GRACE
    hidden: list[str] = field(default_factory=list)
    """Folders that hold answers or records: closed also where a folder around them can be read."""


@dataclass
class Outcome:
    """``status.json``. ``ended_by``: ``exit``, ``deadline``, ``memory``, ``disk``, ``lifeline`` or ``supervisor``."""

    ended_by: str = "supervisor"
    reason: str = ""
    exit_code: int | None = None
    signal: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    started: float = field(default_factory=time.time)
    isolation: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    outcome = Outcome()
    begun = time.monotonic()
    try:
        Supervisor(spec, outcome).run()
    except Exception:
        outcome.ended_by, outcome.reason = "supervisor", traceback.format_exc(limit=3)
    outcome.seconds = time.monotonic() - begun
    temporary = spec.status + ".tmp"
    with open(temporary, "w") as file:
        json.dump(asdict(outcome), file)
    os.replace(temporary, spec.status)


class Supervisor:
    def __init__(self, spec: Spec, outcome: Outcome):
        self.spec, self.outcome = spec, outcome
        self._log_bytes = 0
        self._kernel_kills = _kernel_kills()

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._stop_read, self._stop_write = os.pipe()
        signal.signal(signal.SIGTERM, lambda *_: os.write(self._stop_write, b"x"))
        isolation.prctl(isolation.PR_SET_CHILD_SUBREAPER, 1)
        level = isolation.best_level() if self.spec.isolation == "auto" else self.spec.isolation
        if level == "user" and not _another_user_can_start(self.spec):
            level = "convention"
        weak = level == "convention"
        own_processes = not weak and isolation.enter_pid_namespace()
        report_read, report_write = os.pipe()
        output_read, output_write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(report_read)
            os.close(output_read)
            _first_process(self.spec, level, own_processes, report_write, output_write)
        os.close(report_write)
        os.close(output_write)
        self._watch(child, report_read, output_read)

    def _watch(self, child: int, report: int, output: int) -> None:
        """Until the method ends or breaks a limit: drain its output, read its report, keep the limits."""
        spec, begun = self.spec, time.monotonic()
        poller = select.poll()
        for handle in (report, output, self._stop_read, sys.stdin.fileno()):
            poller.register(handle, select.POLLIN | select.POLLHUP)
        os.set_blocking(output, False)
        message, ended, next_look, next_disk = b"", "", 0.0, 0.0
        with open(spec.log, "ab", buffering=0) as log:
            while not ended:
                for handle, _ in poller.poll(50):
                    if handle == output and not self._drain(output, log):
                        poller.unregister(output)
                    elif handle == report:
                        data = os.read(report, 65536)
                        message += data
                        if not data:
                            ended = "exit"
                    elif handle == self._stop_read or (handle == sys.stdin.fileno() and not os.read(handle, 4096)):
                        ended = "lifeline"
                now = time.monotonic()
                if not ended and now >= next_look:
                    ended = self._over_memory(child) or ("deadline" if now - begun > spec.deadline else "")
                    next_look = now + min(0.5, 0.05 + (now - begun) / 20)
                if not ended and now >= next_disk:
                    ended = self._over_disk()
                    next_disk = now + min(5.0, 0.3 + (now - begun) / 10)
            if ended != "exit":
                self._end(child, polite=ended in ("deadline", "lifeline"))
            self._finish(child, ended, message)
            self._drain(output, log)

    def _drain(self, output: int, log: Any) -> bool:
        """Copy what the method printed; past the cap it is read and thrown away. False when nobody can write any more.

        Not for ever: what several processes print without a pause must not keep the supervisor from the limits.
        """
        for _ in range(DRAIN_READS):
            try:
                data = os.read(output, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            room = LOG_LIMIT - self._log_bytes
            if room > 0:
                log.write(data[:room])
                if len(data) >= room:
                    log.write(b"\n[harness] the log is cut here: it has reached its limit\n")
            self._log_bytes += len(data)
        return True

    # ------------------------------------------------------------------------------------------------- the limits

    def _over_memory(self, child: int) -> str:
        family = descendants(os.getpid())
        used = sum(_resident(pid) for pid in family)
        if used > self.spec.memory:  # pages shared by forks count twice above: ask the exact, slower figure
            used = sum(_proportional(pid) for pid in family)
        self.outcome.peak_memory = max(self.outcome.peak_memory, used)
        if used <= self.spec.memory:
            return ""
        self.outcome.reason = f"used {used / 2**30:.2f} GiB of memory; the budget is {self.spec.memory / 2**30:.2f} GiB"
        return "memory"

    def _over_disk(self) -> str:
        used = sum(_folder_bytes(folder) for folder in self.spec.write)
        if used <= self.spec.disk:
            return ""
        self.outcome.reason = f"wrote {used / 2**30:.2f} GiB; the budget is {self.spec.disk / 2**30:.2f} GiB"
        return "disk"

    def _end(self, child: int, polite: bool) -> None:
        """SIGTERM to all, a grace to save a checkpoint, then SIGKILL until nothing is left."""
        if polite:
            for pid in descendants(os.getpid()):
                _kill(pid, signal.SIGTERM)  # the first process ignores it
            limit = time.monotonic() + self.spec.term_grace
            while time.monotonic() < limit and _alive(child):
                time.sleep(0.02)
        while family := descendants(os.getpid()):
            for pid in family:
                _kill(pid, signal.SIGKILL)
            _reap()
            time.sleep(0.005)

    def _finish(self, child: int, ended: str, message: bytes) -> None:
        self._end(child, polite=False)
        outcome = self.outcome
        outcome.ended_by = ended
        report: dict[str, Any] = {}
        for line in message.splitlines():
            report |= json.loads(line)
        outcome.isolation = report.get("isolation", {})
        if outcome.isolation.get("level") == "user":
            _give_back(self.spec)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        outcome.cpu_seconds = max(usage.ru_utime + usage.ru_stime, report.get("cpu_seconds", 0.0))
        outcome.peak_memory = max(outcome.peak_memory, report.get("peak_memory", 0), usage.ru_maxrss * 1024)
        if ended == "lifeline":
            outcome.reason = "the harness ended or was stopped"
        elif ended == "deadline":
            outcome.reason = f"still running after {self.spec.deadline:.0f} s"
        elif ended == "exit" and "status" not in report:
            outcome.reason = report.get("error", "the run was killed from outside")
            outcome.signal = None if "error" in report else "SIGKILL"
        elif ended == "exit":
            code = os.waitstatus_to_exitcode(report["status"])
            outcome.exit_code = code if code >= 0 else None
            outcome.signal = _signal_name(-code) if code < 0 else None
        if outcome.signal == "SIGKILL" and _kernel_kills() > self._kernel_kills:
            outcome.ended_by, outcome.reason = "memory", "killed by the kernel: the container's memory limit was reached"


# --------------------------------------------------------------------------------------------- inside the sandbox


def _first_process(spec: Spec, level: str, own_processes: bool, report: int, output: int) -> None:
    """The child of the supervisor: sets up the sandbox, starts the method, reaps, reports, ends. Never returns."""
    try:
        _end_with_parent(report)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        sockets = isolation.unix_sockets() if own_processes else []
        network, mounts = isolation.enter_network_and_mount_namespaces() if own_processes else (False, False)
        hidden = mounts and isolation.hide_sockets(sockets, [*spec.read, *spec.write, *spec.argv[:2], spec.cwd])
        inner_read, inner_write = os.pipe()
        method = os.fork()
        if method == 0:
            os.close(inner_read)
            _become_method(spec, level, inner_write, output)
        os.close(inner_write)
        os.close(output)
        os.close(0)
        told = b""
        while data := os.read(inner_read, 4096):
            told += data
        confined = json.loads(told) if told else {}
        reached = confined.get("level", level)
        network = network or bool(confined.get("network")) or level == "container"
        details = ", ".join(
            word
            for word, holds in (
                ("own processes", own_processes),
                ("own /proc", mounts),
                ("no sockets", hidden),
                ("no network", network),
                ("landlock", confined.get("files")),
            )
            if holds
        )
        _tell(report, {"isolation": {"level": reached, "network": bool(network), "details": details}})
        if "error" in confined:
            _tell(report, {"error": confined["error"]})
            os._exit(1)
        status = _reap_until(method)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        _tell(report, {"status": status, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory": usage.ru_maxrss * 1024})
    finally:
        os._exit(0)


def _become_method(spec: Spec, level: str, report: int, output: int) -> None:
    """The method's own process: confined, then replaced by its program. Never returns."""
    try:
        _end_with_parent(report)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (spec.disk, spec.disk))
        os.chdir(spec.cwd)
        os.umask(0o022)
        told: dict[str, Any] = {"level": level}
        if level in ("landlock", "container"):
            told["files"], told["network"] = isolation.landlock(spec.read, spec.write, spec.hidden)
            if level == "landlock" and not told["files"]:
                told["level"] = "convention"
        if os.geteuid() == 0 and level == "user":
            _become_nobody(spec)
        elif os.geteuid() == 0 and level != "convention":
            isolation.drop_capabilities()
        os.set_inheritable(report, False)
        os.write(report, json.dumps(told).encode())
        os.closerange(3, report)
        os.closerange(report + 1, 1024)
        os.execve(spec.argv[0], spec.argv, spec.env)
    except BaseException as error:
        os.write(report, json.dumps({"level": level, "error": f"the method could not be started: {error!r}"}).encode())
    finally:
        os._exit(127)


def _another_user_can_start(spec: Spec) -> bool:
    """Whether the other user can run the method's Python and read what it needs; asked by becoming that user in a child."""
    if os.geteuid() != 0:
        return False
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(isolation.NOBODY, isolation.NOBODY, isolation.NOBODY)
        os.setresuid(isolation.NOBODY, isolation.NOBODY, isolation.NOBODY)
        needed = [path for path in spec.argv if path.startswith("/")] + [path for path in spec.write if os.path.isabs(path)]
        os._exit(0 if all(os.access(path, os.F_OK) for path in needed) and os.access(spec.argv[0], os.X_OK) else 1)
    return os.waitpid(child, 0)[1] == 0


def _become_nobody(spec: Spec) -> None:
    for folder in spec.write:
        for root, _, files in os.walk(folder):
            for path in (root, *(os.path.join(root, name) for name in files)):
                os.chown(path, isolation.NOBODY, isolation.NOBODY, follow_symlinks=False)
    isolation.prctl(isolation.PR_SET_NO_NEW_PRIVS, 1)
    os.setgroups([])
    os.setresgid(isolation.NOBODY, isolation.NOBODY, isolation.NOBODY)
    os.setresuid(isolation.NOBODY, isolation.NOBODY, isolation.NOBODY)
    isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)  # the kernel forgets it when the user changes


def _give_back(spec: Spec) -> None:
    """What another user wrote belongs to the caller again."""
    owner = os.stat(spec.log)
    for folder in spec.write:
        for root, _, files in os.walk(folder):
            for path in (root, *(os.path.join(root, name) for name in files)):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # most real-time signals have no name


def _end_with_parent(report: int) -> None:
    """Let the kernel end this process when its parent ends, and end it now if that has happened already.

    ``report``: a pipe of which the parent alone holds the other end.
    """
    isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
    poller = select.poll()
    poller.register(report, 0)
    if poller.poll(0):  # POLLERR: nobody reads
        os._exit(1)


def _tell(handle: int, value: dict[str, Any]) -> None:
    os.write(handle, (json.dumps(value) + "\n").encode())


def _reap_until(child: int) -> int:
    """Wait for ``child``; orphans that end meanwhile are reaped on the way."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return status


# ------------------------------------------------------------------------------------------------- looks at /proc


def descendants(root: int) -> list[int]:
    """All processes below ``root``, whatever their session or group."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(name))
    found, queue = [], [root]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize() + _shared_memory(pid)
    except (OSError, IndexError, ValueError):
        return 0


def _shared_memory(pid: int) -> int:
    return _status_field(f"/proc/{pid}/status", b"RssShmem:")


def _proportional(pid: int) -> int:
    files = _status_field(f"/proc/{pid}/smaps_rollup", b"Pss_File:")
    return max(0, _status_field(f"/proc/{pid}/smaps_rollup", b"Pss:") - files) or _resident(pid)


def _status_field(path: str, name: bytes) -> int:
    return _counter(path, name) * 1024


def _counter(path: str, name: bytes) -> int:
    """The number after ``name`` at the start of a line; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _kernel_kills() -> int:
    """How many processes of this container the kernel has killed for memory."""
    return _counter("/sys/fs/cgroup/memory.events", b"oom_kill ") or _counter("/sys/fs/cgroup/memory/memory.oom_control", b"oom_kill ")


def _folder_bytes(folder: str) -> int:
    """Bytes on disk below a folder; links are not followed."""
    total, queue = 0, [folder]
    while queue:
        try:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def _alive(pid: int) -> bool:
    """False once it has ended, also while it waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
