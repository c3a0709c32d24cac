"""Cheating methods: each finds nothing, at every isolation level that this machine has."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import isolation
from harness.execute.local import BOOT
from harness.paths import PROJECT
from harness.record import Record
from harness.suite import Entry
from tests.fakes.cheat.attacks import ATTACKS
from tests.faults import lab

ATTACK_NAMES = [
    "reads_private_by_path",
    "reads_private_through_proc",
    "reads_results_and_ranks",
    "reaches_network",
    "writes_to_terminals",
    "writes_elsewhere",
    "imports_the_simulator",
    "ends_the_harness",
    "looks_at_processes",
]


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """Something to reach: a TCP server (MLflow's stand-in), a UDP echo, unix sockets and a terminal, all on this machine."""
    tcp, udp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    named, terminal = socket.socket(socket.AF_UNIX), os.openpty()
    number = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", number))
    unix.bind(f"\0harness-test-{number}")
    unix.listen()
    place = Path(f"/tmp/harness-test-{number}")
    named.bind(str(place))
    place.chmod(0o777)
    named.listen()

    def echo() -> None:
        while True:
            try:
                _, sender = udp.recvfrom(16)
                udp.sendto(b"pong", sender)
            except OSError:
                return

    threading.Thread(target=echo, daemon=True).start()
    yield number
    for handle in (tcp, udp, unix, named):
        handle.close()
    for end in terminal:
        os.close(end)
    place.unlink()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening() as number:
        yield number


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, port: int) -> dict[str, Record]:
    if not isolation.landlock_abi():
        pytest.skip("this kernel has no Landlock: the local level is `user` or `convention`")
    paths = lab.make_paths(tmp_path_factory.mktemp("cheats"), ["faulty", "cheat"], port)
    lab.make_domain(paths)
    entries = [Entry(method="faulty", configs=("fine",)), Entry(method="cheat", configs=tuple(ATTACK_NAMES))]
    (paths.results / "cache" / "other_method").mkdir(parents=True)
    found = lab.carry_out(lab.make_fake_plan(paths, entries), paths, slots=1)  # the honest run first: it leaves things to steal
    planted = [str(path) for root in (paths.results, paths.data, paths.methods[0], PROJECT) for path in root.rglob("*planted*")]
    ours = ("harness/data/planted.py", "private/planted.json")  # the simulator's
    assert [path for path in planted if not path.endswith(ours)] == []
    return found


def test_every_attack_is_tried() -> None:
    assert set(ATTACK_NAMES) == set(ATTACKS) - {"readable"}


@pytest.mark.parametrize("attack", ATTACK_NAMES)
def test_an_attack_finds_nothing(records: dict[str, Record], attack: str) -> None:
    record = records[attack]
    assert record.ok, record.status
    assert record.behaviour["found"] == ""
    assert record.isolation.level == "landlock"
    assert record.isolation.network


def test_what_lies_around_the_answers_can_be_read_and_they_cannot(place: Path) -> None:
    """A checkout below ``/opt`` or ``/usr/local``, which every method reads: its data and results stay closed."""
    if not isolation.landlock_abi():
        pytest.skip("this kernel has no Landlock")
    names = ("tool/file", "project/harness/score.py", "project/data/x/private/targets", "project/data/x/public/users", "project/venv/lib")
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x")
    child = os.fork()
    if child == 0:
        public, environment = str(place / "project/data/x/public"), str(place / "project/venv")
        isolation.landlock([str(place), public, environment], [], [str(place / "project"), str(place / "project/data")])
        seen = [name for name in names if os.path.exists(place / name) and can_open(place / name)]
        os._exit(0 if seen == [names[0], names[3], names[4]] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def can_open(path: Path) -> bool:
    try:
        path.read_text()
        return True
    except OSError:
        return False


def test_shared_memory_does_not_outlive_the_run(records: dict[str, Record]) -> None:
    if "own /proc" not in records["writes_elsewhere"].isolation.details:
        pytest.skip("no mount namespaces here: /dev/shm is the machine's")
    assert not Path("/dev/shm/harness-planted").exists()


# --------------------------------------------------------------------------- the levels one by one, without the harness


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from attacks import ATTACKS
public, output, port = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
found = {name: attack(public, output, port) for name, attack in ATTACKS.items() if name in sys.argv[5].split(",")}
(output / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that another user can reach (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="harness-levels-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def attack_at(level: str, place: Path, port: int, attacks: list[str], python: str) -> tuple[dict[str, list[str]], dict]:
    """Run attacks under the supervisor at one level. Returns what they found, and the isolation that was reached."""
    public, private, stage = place / "domain/public", place / "domain/private", place / "results/stages/cheat/fit-1"
    for folder in (public, private, stage / "out", stage / "scratch", place / "attacks"):
        folder.mkdir(parents=True)
    (public / "users.parquet").write_text("public")
    (private / "targets.parquet").write_text("secret")
    private.chmod(0o700)
    (place / "results/private/ranks").mkdir(parents=True, mode=0o700)
    (place / "results/private").chmod(0o700)
    (place / "results/private/ranks/x.npz").write_text("secret")
    shutil.copy(lab.FAKES / "cheat" / "attacks.py", place / "attacks")
    spec = {
        "argv": [python, "-c", SCRIPT, str(place / "attacks"), str(public), str(stage / "out"), str(port), ",".join(attacks)],
        "env": {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        "cwd": str(stage / "scratch"),
        "log": str(stage / "log.txt"),
        "status": str(stage / "status.json"),
        "read": [str(place / "attacks"), str(public), sys.prefix, sys.base_prefix],
        "write": [str(stage / "out"), str(stage / "scratch")],
        "deadline": 60,
        "memory": 1 << 30,
        "disk": 1 << 28,
        "isolation": level,
    }
    (stage / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-I", "-S", "-c", BOOT, str(PROJECT), str(stage / "spec.json")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    process.wait(60)
    process.stdin.close()
    outcome = json.loads((stage / "status.json").read_text())
    assert outcome["exit_code"] == 0, (outcome, (stage / "log.txt").read_text())
    return json.loads((stage / "out" / "found.json").read_text()), outcome["isolation"]


READING = [
    "reads_private_by_path",
    "reads_private_through_proc",
    "reads_results_and_ranks",
    "reaches_network",
    "ends_the_harness",
    "looks_at_processes",
]


def test_landlock_level(place: Path, port: int) -> None:
    if not isolation.landlock_abi():
        pytest.skip("this kernel has no Landlock")
    found, reached = attack_at("landlock", place, port, READING, sys.executable)
    assert reached["level"] == "landlock"
    assert found == {name: [] for name in READING}


def test_user_level(place: Path, port: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user can only be taken by root")
    python = next((path for path in ("/usr/bin/python3", sys.executable) if other_users_can_run(path)), None)
    if python is None:
        pytest.skip("no Python here that another user can start")
    found, reached = attack_at("user", place, port, READING, python)
    assert reached["level"] == "user"
    assert {name: what for name, what in found.items() if what and "ranks" not in str(what)} == {}
    assert not any("secret" in str(what) or "ranks" in str(what) for what in found["reads_results_and_ranks"])
    assert (place / "results/stages/cheat/fit-1/out/found.json").stat().st_uid == os.getuid()


def test_convention_level_is_named_and_protects_nothing(place: Path, port: int) -> None:
    """The control: the same attacks do find the answers where nothing stops them, so the tests above can fail."""
    found, reached = attack_at("convention", place, port, READING, sys.executable)
    assert reached["level"] == "convention"
    assert found["reads_private_by_path"] and found["reads_results_and_ranks"] and found["reaches_network"]


def other_users_can_run(path: str) -> bool:
    real = Path(path).resolve()
    return real.exists() and all(parent.stat().st_mode & 0o001 for parent in (real, *real.parents))
