"""Jobs handed over through a volume, with a real worker process on a temporary folder.

Its user is the conductor's here; with two users and a real container it runs in tests/containers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import isolation
from harness.execute.handover import MAX_DEPTH, Pinned, TooMuch, TreeCopy, checked_outcome
from harness.execute.local import LocalExecutor, interrupted
from harness.execute.stage import StageFolder
from harness.execute.worker import WorkerExecutor
from harness.paths import PROJECT
from harness.values import ConfigError
from tests.house import PROGRAM, SECONDS, STALE, House, build_house, read_pid, wait_for


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return build_house(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def worker(house: House) -> Iterator[subprocess.Popen[bytes]]:
    process = house.worker()
    yield process
    process.terminate()
    assert process.wait(SECONDS) == 0


@pytest.fixture(scope="module")
def executor(house: House, worker: subprocess.Popen[bytes]) -> WorkerExecutor:
    found = house.executor()
    found.environment()  # as every command does first: it waits until the worker is there
    return found


def test_a_run_gives_what_it_gives_locally(house: House, executor: WorkerExecutor) -> None:
    local = house.run(LocalExecutor(house.paths), "ok", "local")
    result = house.run(executor, "ok", "there")
    assert result["state"] == "ok", result
    same = [[entry for entry in r["outputs"] if entry["path"] != "progress.jsonl"] for r in (local, result)]
    assert same[0] == same[1]
    folder = StageFolder(house.paths.stages / "fake" / "there")
    assert json.loads((folder.out / "progress.jsonl").read_text())["metrics"] == {"loss": 0.5}
    assert folder.log.read_text() == "done\n"
    assert result["isolation"] == local["isolation"]
    assert executor.environment().cpus >= 1


@pytest.mark.skipif(isolation.best_level() != "landlock", reason="this kernel has no Landlock")
def test_a_task_sees_no_other(house: House, executor: WorkerExecutor) -> None:
    result = house.run(executor, "neighbour")
    assert result["state"] == "ok", result


def test_nothing_of_a_task_stays(house: House, executor: WorkerExecutor) -> None:
    house.run(executor, "ok")
    wait_for(lambda: not any((house.jobs / "tasks").iterdir()) and not any((house.jobs / "trash").iterdir()))


def test_a_domain_is_copied_once(house: House, executor: WorkerExecutor) -> None:
    house.run(executor, "ok")
    (copy,) = house.public.iterdir()
    assert copy.name == "tiny-" + json.loads((house.paths.public("tiny") / "domain.json").read_text())["digest"][:12]
    before = copy.stat().st_mtime_ns
    house.run(house.executor(), "ok")
    assert [path.stat().st_mtime_ns for path in house.public.iterdir()] == [before]


def test_a_damaged_domain_is_not_handed_over(house: House, worker: Any, tmp_path: Path) -> None:
    damaged = build_house(tmp_path)
    info = damaged.paths.public("tiny") / "domain.json"
    info.write_text(info.read_text().replace('"digest": "', '"digest": "0000'))
    executor = WorkerExecutor(damaged.paths, house.jobs, damaged.public, stale=STALE)
    result = damaged.run(executor, "ok")
    assert result["state"] == "failed"
    assert "prepare the domain again" in result["reason"]
    assert not any(damaged.public.iterdir())


def test_crash(house: House, executor: WorkerExecutor) -> None:
    result = house.run(executor, "crash")
    assert result["state"] == "failed"
    assert "no luck today" in result["reason"]
    assert "Traceback" in result["log_tail"]


def test_skip(house: House, executor: WorkerExecutor) -> None:
    result = house.run(executor, "skip")
    assert (result["state"], result["reason"]) == ("skipped", "no pictures")


def test_timeout(house: House, executor: WorkerExecutor) -> None:
    result = house.run(executor, "hang", deadline=0.7)
    assert result["state"] == "timeout"
    assert house.is_quiet()


BAD = ("link", "folder link", "fifo", "curve is a fifo", "predictions linked", "predictions twice", "no predictions", "pickle")


@pytest.mark.parametrize("do", BAD)
def test_bad_output_gets_the_local_verdict(house: House, executor: WorkerExecutor, do: str) -> None:
    local = house.run(LocalExecutor(house.paths), do, f"local-{do}")
    result = house.run(executor, do)
    assert result["state"] == local["state"] == "invalid_output"
    assert result["reason"].split(" (")[0] == local["reason"].split(" (")[0] or do == "predictions twice"


def test_output_that_its_owner_has_closed(house: House, executor: WorkerExecutor) -> None:
    result = house.run(executor, "shut")
    assert result["state"] == "ok", result
    assert "closed/file" in [entry["path"] for entry in result["outputs"]]


def test_output_larger_than_the_budget(house: House, executor: WorkerExecutor) -> None:
    result = house.run(executor, "sparse")
    assert result["state"] == "failed"
    assert "larger than the budget" in result["reason"]


def test_inputs_of_earlier_stages(house: House, executor: WorkerExecutor, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "note").write_text("from the first stage")
    assert house.run(executor, "inputs", inputs={"first": tmp_path})["state"] == "ok"


def test_checkpoint_lives_until_the_stage_is_sealed(house: House, executor: WorkerExecutor) -> None:
    checkpoint = house.jobs / "checkpoints" / "fake" / "long"
    assert house.interrupt(house.executor(), house.cache / "pid", "long")["state"] == "interrupted"
    assert (checkpoint / "weights").exists()
    result = house.run(executor, "resume", "long")
    assert result["state"] == "ok"
    assert "found half" in (house.paths.stages / "fake" / "long" / "log.txt").read_text()
    house.run(executor, "ok")  # the next run gives the checkpoint away
    assert not checkpoint.exists()


def test_stop(house: House, worker: Any) -> None:
    executor = house.executor()
    result = house.interrupt(executor, house.cache / "pid", "stopped")
    assert (result["state"], result["reason"]) == ("interrupted", "the harness was stopped")
    assert house.is_quiet()
    assert (house.jobs / "checkpoints" / "fake" / "stopped" / "weights").exists()
    assert house.run(executor, "ok")["state"] == "interrupted"


def test_a_killed_supervisor_leaves_nobody_behind(house: House, executor: WorkerExecutor) -> None:
    def kill_the_supervisor() -> None:
        read_pid(house.cache / "pid")
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes()
                if b"supervised-spec.json" in words and str(house.jobs).encode() in words and b"fake.fit" in words:
                    os.kill(int(path.parent.name), signal.SIGKILL)

    for name in ("pid", "daemon"):
        (house.cache / name).unlink(missing_ok=True)
    threading.Thread(target=kill_the_supervisor).start()
    result = house.run(executor, "daemon")
    assert result["state"] == "interrupted", result
    assert "supervisor" in result["reason"]
    assert house.is_quiet()


@pytest.mark.slow
def test_a_dead_conductor_ends_its_runs(house: House, worker: Any) -> None:
    (house.cache / "pid").unlink(missing_ok=True)
    code = (
        "import sys; from pathlib import Path; from harness.paths import Paths; from tests.house import House; root = Path(sys.argv[1])\n"
        "house = House(Paths(root / 'project', root / 'data', root / 'results', (root / 'methods',)), root / 'jobs', root / 'public')\n"
        "house.run(house.executor(), 'hang', 'orphan')"
    )
    conductor = subprocess.Popen([sys.executable, "-c", code, str(house.jobs.parent)], cwd=PROJECT)
    read_pid(house.cache / "pid")
    conductor.kill()
    conductor.wait()
    wait_for(house.is_quiet)
    wait_for(lambda: not any((house.jobs / "tasks").iterdir()))
    assert (house.jobs / "checkpoints" / "fake" / "orphan" / "weights").exists()


def test_a_second_task_waits_for_the_checkpoint_of_the_first(house: House, worker: Any) -> None:
    """As when a conductor was killed and its successor takes the same stage while the first task is still ending."""
    (house.cache / "pid").unlink(missing_ok=True)
    first, second = house.executor(), house.executor()
    results: dict[str, Any] = {}
    with house.task("hang", "shared") as one:
        thread = threading.Thread(target=lambda: results.update(first=first.run(one)))
        thread.start()
        read_pid(house.cache / "pid")
        two = replace(one, job=replace(one.job, configuration={"do": "resume"}))
        other = threading.Thread(target=lambda: results.update(second=second.run(two)))
        other.start()
        wait_for(lambda: len(list((house.jobs / "tasks").glob("fake.fit.*/started"))) == 2)
        time.sleep(0.3)
        assert not results
        first.stop()
        other.join(SECONDS)
        thread.join(SECONDS)
    assert results["first"]["ended_by"] == "lifeline"
    assert (results["second"]["ended_by"], results["second"]["exit_code"]) == ("exit", 0)


@pytest.mark.slow
def test_a_dead_worker_interrupts_and_a_new_one_goes_on(tmp_path: Path) -> None:
    house = build_house(tmp_path)
    process, executor = house.worker(), house.executor()
    executor.environment()
    killer = threading.Thread(target=lambda: (read_pid(house.cache / "pid"), process.kill(), process.wait()))
    killer.start()
    began = time.monotonic()
    result = house.run(executor, "hang")
    assert result["state"] == "interrupted"
    assert "docker compose" in result["reason"]
    assert time.monotonic() - began < SECONDS
    killer.join()
    successor = house.worker()
    try:
        wait_for(lambda: house.run(executor, "ok")["state"] == "ok")
        assert house.is_quiet()
        wait_for(lambda: not any((house.jobs / "tasks").iterdir()))
    finally:
        successor.terminate()
        successor.wait(SECONDS)


def test_a_worker_that_is_stopped_interrupts_its_runs(tmp_path: Path) -> None:
    house = build_house(tmp_path)
    process, executor = house.worker(), house.executor()
    executor.environment()
    threading.Thread(target=lambda: (read_pid(house.cache / "pid"), process.terminate())).start()
    result = house.run(executor, "hang")
    assert (result["state"], result["reason"]) == ("interrupted", "the worker was stopped")
    assert process.wait(SECONDS) == 0
    assert house.is_quiet()


def test_without_a_worker_the_mend_is_named(tmp_path: Path) -> None:
    house = build_house(tmp_path)
    with pytest.raises(ConfigError, match="docker compose up -d worker"):
        WorkerExecutor(house.paths, house.jobs, house.public, patience=0.1).environment()
    with pytest.raises(ConfigError, match="HARNESS_JOBS"):
        WorkerExecutor(house.paths, tmp_path / "nowhere", house.public, patience=0.1).environment()


def test_a_worker_with_another_version_of_a_method_is_refused(house: House, worker: Any, tmp_path: Path) -> None:
    other = build_house(tmp_path)
    (other.paths.methods[0] / "fake" / "run.py").write_text(PROGRAM + "# changed\n")
    executor = WorkerExecutor(other.paths, house.jobs, house.public, patience=SECONDS)
    with pytest.raises(ConfigError, match="another version of method 'fake'"):
        executor.environment()


# ------------------------------------------------------------------------------------- reading a hostile volume


def test_copy_takes_no_detour(tmp_path: Path) -> None:
    secret, source, target = tmp_path / "secret", tmp_path / "source", tmp_path / "target"
    (secret / "below").mkdir(parents=True)
    (secret / "below" / "targets").write_text("answers")
    source.mkdir()
    (source / "folder").symlink_to(secret / "below")
    (source / "file").symlink_to(secret / "below" / "targets")
    (source / "plain").write_text("x")
    with Pinned(source) as folder:
        TreeCopy(1 << 20).copy(folder, target)
    assert sorted(path.name for path in target.iterdir()) == ["file", "folder", "plain"]
    assert [path.name for path in target.rglob("*") if path.exists()] == ["plain"]
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        Pinned(source / "folder")


def test_copy_keeps_holes_and_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with open(tmp_path / "source" / "file", "wb") as file:
        file.write(b"start")
        file.truncate(8 << 20)
    with Pinned(tmp_path / "source") as folder:
        TreeCopy(8 << 20).copy(folder, tmp_path / "target")
        copy = tmp_path / "target" / "file"
        assert copy.read_bytes() == (tmp_path / "source" / "file").read_bytes()
        assert copy.stat().st_blocks * 512 < 4 << 20
        with pytest.raises(TooMuch):
            TreeCopy((8 << 20) - 1).copy(folder, tmp_path / "less")


def test_copy_stops_at_a_depth(tmp_path: Path) -> None:
    (tmp_path / "source" / "/".join("d" * (MAX_DEPTH + 2))).mkdir(parents=True)
    with Pinned(tmp_path / "source") as folder:
        TreeCopy(1).copy(folder, tmp_path / "target")
    assert sum(path.is_symlink() for path in (tmp_path / "target").rglob("*")) == 1


GOOD = interrupted("why") | {"ended_by": "exit", "exit_code": 0, "isolation": {"level": "container", "network": True, "details": ""}}


def test_a_status_is_read() -> None:
    assert checked_outcome(json.dumps(GOOD).encode()) == GOOD | {"started": 0.0}


@pytest.mark.parametrize("change", [{"ended_by": "magic"}, {"seconds": "NaN"}, {"exit_code": "0x"}, {"isolation": 3}, {"more": 1}])
def test_a_forged_status_is_a_failure(change: dict[str, Any]) -> None:
    assert checked_outcome(json.dumps(GOOD | change).encode())["ended_by"] == "supervisor"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"ended_by": "exit"}'])
def test_a_torn_status_is_a_failure(text: str) -> None:
    assert checked_outcome(text.encode())["ended_by"] == "supervisor"
