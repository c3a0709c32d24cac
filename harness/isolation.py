"""Keep a method from the answers: namespaces, Landlock, another user. Standard library only, Linux.

Used by the supervisor between fork and exec. Each means is tried and what was reached is reported, never assumed:

- *namespaces* (as root or through a user namespace): own processes (nothing outlives the run), own network without any
  route, own ``/proc`` and ``/dev/shm``, and no unix sockets of others: neither Landlock nor a network namespace keeps a method
  from asking the Docker engine, the user's systemd or a terminal multiplexer to read a file for it;
- *Landlock* (kernel 5.13; TCP from 6.7; signals and abstract sockets from 6.12): only named folders can be read, only
  the run's own folders can be written, whoever the user is;
- *another user*, where the harness is root and the kernel has no Landlock.

The level in the record is the strongest that holds for files: ``container``, ``landlock``, ``user``, ``convention``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
KEPT_CAPABILITIES = {0, 1, 3, 4}
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID: root keeps what file ownership means to it, and nothing else."""
NOBODY = 65534
MS_BIND = 0x1000
KEPT_SOCKETS = ("/run/nvidia-persistenced",)

SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ_RIGHTS = EXECUTE | READ_FILE | READ_DIR

SYSTEM_READ = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc",
    "/proc",
    "/sys",
    "/opt",
    "/run/nvidia-persistenced",
    "/run/systemd/resolve",
)
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "shm", "dri", "kfd")
"""Without terminals (``pts``): what is written to the user's own would pass for the harness's table."""


def prctl(option: int, value: int = 0) -> bool:
    return _LIBC.prctl(option, value, 0, 0, 0) == 0


def unshare(flags: int) -> bool:
    return _LIBC.unshare(flags) == 0


def enter_pid_namespace() -> bool:
    """Make the next child the first process of a namespace of its own; when it ends, the kernel ends all in it.

    As a normal user this goes through a user namespace that maps only that user to itself.
    """
    if os.geteuid() == 0:
        return unshare(CLONE_NEWPID)
    uid, gid = os.geteuid(), os.getegid()
    if not unshare(CLONE_NEWUSER | CLONE_NEWPID):
        return False
    try:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    except OSError:
        return False
    return True


def enter_network_and_mount_namespaces() -> tuple[bool, bool]:
    """For the first process of a PID namespace. Returns (no network, own /proc and /dev/shm)."""
    network = unshare(CLONE_NEWNET)
    if network:
        with contextlib.suppress(OSError):
            _loopback_up()
    unshare(CLONE_NEWIPC)
    mounts = unshare(CLONE_NEWNS) and _mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    if mounts:
        mounts = _mount(b"proc", b"/proc", b"proc", 0xE, None)  # nosuid, nodev, noexec
        if os.path.isdir("/dev/shm"):
            _mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0x6, b"mode=1777")
    return network, mounts


def unix_sockets() -> list[str]:
    """Paths of the unix sockets that are bound in this network namespace."""
    try:
        with open("/proc/net/unix", "rb") as file:
            paths = [line.split(maxsplit=7)[-1].rstrip(b"\n") for line in file]
    except OSError:
        return []
    return sorted({os.fsdecode(path) for path in paths if path.startswith(b"/")})


def hide_sockets(found: Iterable[str], needed: Iterable[str]) -> bool:
    """Put nothing in the place of ``/run`` and of all other sockets ``found``. For a mount namespace of one's own.

    ``needed``: paths of the run; what lies there stays. False where something could not be hidden.
    """
    needed = [os.path.realpath(path) for path in needed]
    kept = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in KEPT_SOCKETS if os.path.isdir(path)}
    done = True
    if not any(_is_below(path, "/run") for path in needed) and os.path.isdir("/run"):
        done = _mount(b"tmpfs", b"/run", b"tmpfs", 0x6, b"mode=755,size=1m")
        for path, handle in kept.items() if done else ():
            os.makedirs(path)
            _mount(f"/proc/self/fd/{handle}".encode(), path.encode(), None, MS_BIND, None)
    for handle in kept.values():
        os.close(handle)
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not any(_is_below(path, kept) for kept in KEPT_SOCKETS):
                done &= _mount(b"/dev/null", os.fsencode(path), None, MS_BIND, None)
    return done


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> bool:
    return _LIBC.mount(source, target, kind, ctypes.c_ulong(flags), data) == 0


def _loopback_up() -> None:
    """``ip link set lo up``: torchrun and gloo talk to themselves over it; it leads nowhere else."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sH14s", b"lo", 0x1 | 0x40, b"")  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS


def drop_capabilities() -> None:
    """Leave root only what file ownership means (``KEPT_CAPABILITIES``), across exec."""
    for capability in range(64):
        if capability not in KEPT_CAPABILITIES:
            prctl(PR_CAPBSET_DROP, capability)
    kept = sum(1 << capability for capability in KEPT_CAPABILITIES)
    header = struct.pack("Ii", 0x20080522, 0)
    data = struct.pack("IIIIII", kept, kept, 0, 0, 0, 0)
    _LIBC.capset(header, data)


# -------------------------------------------------------------------------------------------------------- Landlock


def landlock_abi() -> int:
    """Version of the kernel's Landlock; 0 where it is missing or switched off."""
    return max(0, _LIBC.syscall(SYS_LANDLOCK_CREATE, None, 0, 1))


def landlock(read: Iterable[str], write: Iterable[str], hidden: Iterable[str] = ()) -> tuple[bool, bool]:
    """Confine this process and all it starts. Returns (files confined, TCP confined).

    ``read``: files and folders that can be read and executed. ``write``: folders in which everything can be done.
    ``hidden``: folders that stay closed although they lie in one that can be read (a checkout below ``/opt``, say); what
    ``read`` and ``write`` name inside them is open all the same.
    Needs no privilege, cannot be undone. Paths that do not exist are left out.
    """
    abi = landlock_abi()
    if abi < 1:
        return False, False
    rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    network = 3 if abi >= 4 else 0  # bind and connect TCP
    scoped = 3 if abi >= 6 else 0  # abstract unix sockets and signals
    fields = (rights, network, scoped)
    attribute = struct.pack("QQQ"[: 1 if abi < 4 else 2 if abi < 6 else 3], *fields[: 1 if abi < 4 else 2 if abi < 6 else 3])
    ruleset = _LIBC.syscall(SYS_LANDLOCK_CREATE, attribute, len(attribute), 0)
    if ruleset < 0:
        return False, False
    try:
        closed = [os.path.realpath(path) for path in hidden]
        for path in (*SYSTEM_READ, *read):
            for part in _without(path, closed):
                _allow(ruleset, part, READ_RIGHTS & rights)
        for path in write:
            _allow(ruleset, path, rights)
        for name in DEVICES:
            _allow(ruleset, f"/dev/{name}", rights if name == "shm" else (READ_FILE | READ_DIR | WRITE_FILE | IOCTL_DEV) & rights)
        for name in os.listdir("/dev"):
            if name.startswith("nvidia"):
                _allow(ruleset, f"/dev/{name}", (READ_FILE | READ_DIR | WRITE_FILE | IOCTL_DEV) & rights)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        done = _LIBC.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)
    return done, done and network > 0


def _without(path: str, closed: list[str]) -> Iterator[str]:
    """``path``, or, where something closed lies in it, all in it that does not lead there. Landlock can only allow."""
    real = os.path.realpath(path)
    if real in closed:
        return
    if not any(_is_below(folder, real) for folder in closed):
        yield path
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(real):
            child = os.path.join(real, name)
            if not os.path.islink(child):  # what it points to is open only if something else says so
                yield from _without(child, closed)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= FILE_RIGHTS
        rule = struct.pack("<Qi", rights, handle)
        if rights and _LIBC.syscall(SYS_LANDLOCK_ADD, ruleset, 1, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"Landlock refused a rule for {path}")
    finally:
        os.close(handle)


def best_level() -> str:
    """The level that a run started here would reach (``HARNESS_ISOLATION`` can force a weaker one, for tests)."""
    forced = os.environ.get("HARNESS_ISOLATION", "auto")
    if forced != "auto":
        return forced
    if os.environ.get("HARNESS_CONTAINER") == "worker":
        return "container"
    if landlock_abi() >= 1:
        return "landlock"
    return "user" if os.geteuid() == 0 else "convention"
