"""The local server's life: one for all harnesses of a results folder, none without them, however they end.

MLflow itself is replaced by a small stand-in with the same command line and the same two processes, which starts in an
instant; the real one is started in the same way for the tests of publishing (``conftest``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import mlflow_server
from harness.paths import PROJECT

STAND_IN = """
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")
    def log_message(self, *args):
        pass

words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
assert words[0] == "server" and value("--host") == "127.0.0.1" and value("--workers") == "1", words
assert os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false" and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
assert "MLFLOW_BACKEND_STORE_URI" not in os.environ
if os.path.exists("broken"):
    sys.exit("the database is broken")
if os.path.exists("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "worker" in words:
    time.sleep(float(open("slow").read()) if os.path.exists("slow") else 0.0)
    HTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
with open("starts", "a") as file:
    file.write("x")
sys.exit(subprocess.Popen([sys.executable, "-m", "mlflow", *words, "worker"]).wait())
"""

USER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from harness import mlflow_server
server = mlflow_server.ensure(Path(sys.argv[2]))
print(server.uri, server.started, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "stand-in" / "mlflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:///somewhere-else.db")
    yield tmp_path / "results"
    assert wait_until(lambda: not left(tmp_path)), f"left behind: {left(tmp_path)}"


def left(folder: Path) -> list[str]:
    """Processes that work in the folder: the keeper, the server, its worker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd").startswith(str(folder)) and (entry / "cmdline").read_bytes():
                found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()!r:.200}")
    return found


def wait_until(look: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def user(results: Path) -> subprocess.Popen[str]:
    """Another harness, in a process of its own, that uses the server until its standard input closes."""
    command = [sys.executable, "-c", USER, str(PROJECT), str(results)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout
    uri, started = process.stdout.readline().split()
    return uri, started


def end(process: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        process.kill()
    process.communicate()


def starts(results: Path) -> int:
    return len((results / "mlflow" / "starts").read_text())


def test_harnesses_at_once_share_one_server(results: Path) -> None:
    """It outlives the one that started it, and ends with the last: both ended by kill -9."""
    users = [user(results) for _ in range(4)]
    answers = [said(process) for process in users]
    assert len({uri for uri, _ in answers}) == 1
    assert sorted(started for _, started in answers) == ["False", "False", "False", "True"]
    assert starts(results) == 1
    starter = next(process for process, (_, started) in zip(users, answers, strict=True) if started == "True")
    users.remove(starter)
    end(starter, kill=True)
    time.sleep(1.0)
    assert mlflow_server.answers(answers[0][0]), "three still use it"
    for process in users:
        end(process, kill=True)
    assert wait_until(lambda: not mlflow_server.answers(answers[0][0], timeout=1.0))


def test_it_ends_when_closed_and_starts_again(results: Path) -> None:
    for count in (1, 2):
        server = mlflow_server.ensure(results)
        assert (server.local, server.started) == (True, True)
        again = mlflow_server.ensure(results)
        assert (again.uri, again.started) == (server.uri, False)
        again.close()
        time.sleep(0.6)
        assert mlflow_server.answers(server.uri)
        server.close()
        assert wait_until(lambda: not left(results))
        assert starts(results) == count


def test_it_may_be_wanted_again_at_any_moment_of_its_end(results: Path) -> None:
    for delay in (0.0, 0.1, 0.2, 0.25, 0.3, 0.4):
        with contextlib.closing(mlflow_server.ensure(results)) as server:
            time.sleep(0.3)
            assert mlflow_server.answers(server.uri)
        time.sleep(delay)


def test_a_killed_harness_leaves_nothing(results: Path) -> None:
    """Killed while the server starts: at any moment of it."""
    for delay in (0.0, 0.1, 0.2, 0.3, 0.5):
        process = user(results)
        time.sleep(delay)
        end(process, kill=True)
    assert wait_until(lambda: not left(results))


def test_a_killed_keeper_s_server_is_ended_by_the_next_one(results: Path) -> None:
    (results / "mlflow").mkdir(parents=True)
    (results / "mlflow" / "deaf").touch()
    with contextlib.closing(mlflow_server.ensure(results)) as first:
        keeper = next(int(text.split()[0]) for text in left(results) if "mlflow_server.py" in text)
        os.kill(keeper, signal.SIGKILL)
        assert wait_until(lambda: not alive(keeper))
        group = json.loads((results / "mlflow" / "process.json").read_text())["group"]
        assert alive(group), "it is deaf to the signal that its keeper's end sends"
        with contextlib.closing(mlflow_server.ensure(results)) as second:
            assert second.started
            assert not alive(group)
            assert mlflow_server.answers(second.uri)
        first.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_noted_group_that_is_not_ours_is_left_alone(results: Path) -> None:
    """Numbers of processes come round again."""
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    folder = results / "mlflow"
    folder.mkdir(parents=True)
    (folder / "process.json").write_text(json.dumps({"group": stranger.pid}))
    mlflow_server.ensure(results).close()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_taken_port_is_passed_over(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of the connections of the test before is no listener
        try:
            other.bind(("127.0.0.1", mlflow_server.FIRST_PORT))
            other.listen()
        except OSError:
            pass  # somebody has it already: as good
        with contextlib.closing(mlflow_server.ensure(results)) as server:
            assert server.uri != f"http://127.0.0.1:{mlflow_server.FIRST_PORT}"


def test_a_server_that_takes_the_port_while_ours_starts_is_not_taken_for_ours(results: Path) -> None:
    """Two harnesses with results of their own: each writes to its own server, though one finds the other's on the port that it chose."""
    slow, quick = results / "slow", results / "quick"
    (slow / "mlflow").mkdir(parents=True)
    (slow / "mlflow" / "slow").write_text("2.0")
    users = [user(slow)]
    assert wait_until((slow / "mlflow" / "process.json").exists)
    users.append(user(quick))
    addresses = [said(process)[0] for process in users]
    assert len(set(addresses)) == 2 and all(map(mlflow_server.answers, addresses))
    for process in users:
        end(process)


def test_a_state_file_of_the_past_is_not_believed(results: Path) -> None:
    """It may name a port where something else answers by now."""
    folder = results / "mlflow"
    folder.mkdir(parents=True)
    with contextlib.closing(mlflow_server.ensure(results.with_name("other"))) as other:
        (folder / "server.json").write_text(json.dumps({"uri": other.uri, "pid": 1}))
        with contextlib.closing(mlflow_server.ensure(results)) as own:
            assert own.started
            assert own.uri != other.uri


def test_a_server_that_does_not_start_says_why(results: Path) -> None:
    (results / "mlflow").mkdir(parents=True)
    (results / "mlflow" / "broken").touch()
    with pytest.raises(mlflow_server.ServerError, match="the database is broken"):
        mlflow_server.ensure(results)


def test_it_yields_to_timed_runs(results: Path) -> None:
    """Started beside runs it has low priority, started by ``publish`` or ``ui`` the usual one."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    for polite, expected in ((True, usual + mlflow_server.NICE), (False, usual)):
        with contextlib.closing(mlflow_server.ensure(results, polite=polite)):
            group = json.loads((results / "mlflow" / "process.json").read_text())["group"]
            assert os.getpriority(os.PRIO_PGRP, group) == min(expected, 19)
        assert wait_until(lambda: not left(results))


def test_waiting_can_be_given_up(results: Path) -> None:
    with pytest.raises(mlflow_server.ServerError, match="given up"):
        mlflow_server.ensure(results, cancelled=lambda: True)


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "./mlruns", "file:///tmp/mlruns", "databricks", "http://"])
def test_addresses_that_are_no_server_s(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(mlflow_server.ServerError, match="Unset it"):
        mlflow_server.ensure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_configured_server_is_used_as_it_is(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(mlflow_server.ensure(results)) as local:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", local.uri)
        server = mlflow_server.ensure(tmp_path / "unused")
        assert (server.uri, server.local, server.started) == (local.uri, False, False)
        assert not (tmp_path / "unused").exists()
        server.close()


def test_the_process_that_publishes_stays_light() -> None:
    """Neither MLflow nor a data frame or tensor library is imported by the code that talks to MLflow."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import harness.tracking, harness.charts; "
        "print(sorted({'mlflow', 'torch', 'pandas', 'polars', 'matplotlib', 'requests', 'httpx'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(PROJECT)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
