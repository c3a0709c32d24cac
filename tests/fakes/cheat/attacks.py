"""Attacks on the blind test, with the standard library alone. Each returns a list of what it got hold of."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def reads_private_by_path(public: Path, output: Path, port: int) -> list[str]:
    private = public.parent / "private"
    candidates = [private / name for name in ("targets.parquet", "items.parquet", "users.parquet", "oracle.npz", "private.json")]
    with contextlib.suppress(OSError):
        candidates += list(private.iterdir())
    candidates += [public / ".." / "private" / "targets.parquet"]
    with contextlib.suppress(OSError):
        link = output / "link"
        link.symlink_to(private)
        candidates.append(link / "targets.parquet")
    found = [str(path) for path in candidates if readable(path)]
    with contextlib.suppress(OSError):
        os.link(private / "targets.parquet", output / "stolen")
        found.append("hard link")
        (output / "stolen").unlink()  # left there, it would be an invalid output, and the find would not be told
    with contextlib.suppress(OSError):
        (output / "link").unlink()
    return found


def reads_private_through_proc(public: Path, output: Path, port: int) -> list[str]:
    target = str(public.parent / "private" / "targets.parquet")
    found = []
    for pid in ["self", "1", str(os.getppid()), *filter(str.isdigit, os.listdir("/proc"))]:
        for way in (f"/proc/{pid}/root{target}", f"/proc/{pid}/cwd/../private/targets.parquet"):
            if readable(Path(way)):
                found.append(way)
        if pid not in ("self", str(os.getpid())):
            with contextlib.suppress(OSError):
                found += [f"{way.name} open in {pid}" for way in Path(f"/proc/{pid}/fd").iterdir() if "private" in os.readlink(way)]
            with contextlib.suppress(OSError):
                open(f"/proc/{pid}/mem", "rb").close()
                found.append(f"memory of {pid}")
    return found


def reads_results_and_ranks(public: Path, output: Path, port: int) -> list[str]:
    found = []
    for root in list(output.parents)[:6]:
        for pattern in (
            "private/ranks/*",
            "records/*.json",
            "mlflow/*",
            "tables/*",
            "stages/*/*/out/predictions.npz",
            "stages/*/*/stage.json",
        ):
            with contextlib.suppress(OSError):
                found += [str(path) for path in root.glob(pattern) if output not in path.parents and readable(path)]
    return found


def reaches_network(public: Path, output: Path, port: int) -> list[str]:
    found = []
    for address in (("127.0.0.1", port), ("::1", port)):
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=2):
            found.append(f"connected to {address}")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        handle.settimeout(1)
        handle.sendto(b"ping", ("127.0.0.1", port))
        if handle.recvfrom(16)[0] == b"pong":
            found.append("an answer by UDP")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as handle:
        handle.connect(f"\0harness-test-{port}")
        found.append("an abstract unix socket")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as handle:
        handle.connect(f"/tmp/harness-test-{port}")  # stands for the Docker engine's, or that of the user's systemd
        found.append("a unix socket by path")
    return found


def writes_to_terminals(public: Path, output: Path, port: int) -> list[str]:
    """A table of its own on the screen of whoever started the benchmark."""
    found = []
    for name in range(64):
        with contextlib.suppress(OSError):
            os.close(os.open(f"/dev/pts/{name}", os.O_RDWR | os.O_NOCTTY))
            found.append(f"terminal {name}")
    return found


def writes_elsewhere(public: Path, output: Path, port: int) -> list[str]:
    import harness.contract

    stage = output.parent
    targets = [
        stage / "stage.json",
        stage / "status.json",
        stage / "log.txt",
        stage.parent / "planted",
        *(parent / "cache" / "other_method" / "planted" for parent in stage.parents),
        *(parent / "records" / "planted.json" for parent in stage.parents),
        public / "planted",
        Path(__file__).parent / "planted.py",
        Path(harness.contract.__file__).parent / "planted.py",
        Path(sys.prefix) / "planted",
        Path(os.__file__).parent / "planted.py",
        Path("/tmp/harness-planted"),
    ]
    for finished in stage.parent.glob("*/out"):
        if finished != output:
            targets.append(finished / "planted")
    found = []
    for path in targets:
        with contextlib.suppress(OSError):
            path.write_text("planted")
            found.append(str(path))
    with contextlib.suppress(OSError):  # shared memory is the method's own where it has a mount namespace: the test looks from outside
        Path("/dev/shm/harness-planted").write_text("planted")
    with contextlib.suppress(OSError):
        (public / "users.parquet").open("r+b").close()
        found.append("the domain")
    return found


def imports_the_simulator(public: Path, output: Path, port: int) -> list[str]:
    found = []
    places = {Path(p) for p in sys.path if p} | set(Path(__file__).parents) | {Path(sys.prefix).parent}
    sys.path[:0] = [str(place) for place in places if (place / "harness" / "data" / "simulate.py").exists()]
    for name in [name for name in sys.modules if name.split(".")[0] == "harness"]:
        del sys.modules[name]
    for name in ("harness.data.simulate", "harness.score", "harness.schedule"):
        with contextlib.suppress(ImportError, OSError):
            __import__(name)
            found.append(name)
    return found


def ends_the_harness(public: Path, output: Path, port: int) -> list[str]:
    found = []
    for pid in {os.getppid(), *_harness_processes()}:
        if pid > 1:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
                found.append(f"can signal {pid}")
    return found


def looks_at_processes(public: Path, output: Path, port: int) -> list[str]:
    """What other processes tell by their command line and environment (the paths of private data, tokens)."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) in (1, os.getpid()):
            continue
        with contextlib.suppress(OSError):
            if Path(f"/proc/{name}/environ").read_bytes():
                found.append(f"environment of {name}")
    with contextlib.suppress(OSError):
        done = subprocess.run(["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True)
        lines = [line.strip() for line in done.stdout.splitlines() if "harness" in line and "attacks" not in line]
        found += [line[:60] for line in lines if line.split()[0] not in ("1", str(os.getpid()))]  # itself and its first process
    return found


def readable(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def _harness_processes() -> list[int]:
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if b"harness" in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                pids.append(int(name))
    return pids


ATTACKS = {
    name: value
    for name, value in globals().items()
    if callable(value) and getattr(value, "__module__", None) == __name__ and name[0] != "_"
}
