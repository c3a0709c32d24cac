"""The table of faults and cheats by isolation level, filled in by running them:

    python -m tests.faults.table [docker] > results/performance/faults.md

``docker`` adds the container level (needs a Docker engine and the image). At the level ``convention`` the attack that
writes into the environment is left out: nothing would stop it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import isolation, provenance
from harness.execute.local import LocalExecutor
from harness.execute.stage import Executor
from harness.paths import Paths
from harness.record import Record
from harness.suite import Entry
from tests.faults import lab
from tests.faults.test_cheats import ATTACK_NAMES, listening
from tests.faults.test_faults import EXPECTED, leftovers

DESTRUCTIVE = "writes_elsewhere"


def executors(paths: Paths, level: str) -> Executor:
    if level == "container":
        from harness.execute.docker import DockerExecutor

        return DockerExecutor(paths)
    os.environ["HARNESS_ISOLATION"] = level
    return LocalExecutor(paths)


def run_level(level: str, port: int) -> tuple[dict[str, Record], list[str]]:
    """All faults and cheats at one level. Returns the records by name, and processes that were left behind."""
    with tempfile.TemporaryDirectory(prefix="harness-faults-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        paths = lab.make_paths(root, ["faulty", "cheat"], port)
        lab.make_domain(paths)
        (paths.caches / "other_method").mkdir(parents=True)
        attacks = tuple(name for name in ATTACK_NAMES if level != "convention" or name != DESTRUCTIVE)
        entries = [Entry(method="faulty", configs=tuple(EXPECTED)), Entry(method="cheat", configs=attacks)]
        seconds = 12.0 if level == "container" else 4.0
        plan = lab.make_fake_plan(paths, entries, seconds=seconds)
        records = lab.carry_out(plan, paths, executor=executors(paths, level))
        return records, leftovers(root)


def outcome(record: Record | None) -> str:
    if record is None:
        return "not tried"
    if record.method.name == "faulty" or not record.ok:
        return record.status.state
    count = record.behaviour["count"]
    return f"FINDS {count}" if count else "nothing"


def lines(levels: list[str]) -> Iterator[str]:
    environment = provenance.environment()
    with listening() as port:
        seen = {level: run_level(level, port) for level in levels}
    yield "# Faults and cheats, by isolation level"
    yield ""
    command = " ".join(["python -m tests.faults.table", *sys.argv[1:]])
    who = "root" if os.geteuid() == 0 else "a normal user"
    yield f"`{command}` on {environment.cpu}, {environment.os}, Landlock ABI {isolation.landlock_abi()}, as {who}."
    yield "Faults show the status that the run got; all other runs of the suite finished. Attacks show what they got hold of."
    yield "At `convention` nothing is meant to stop them: it is the control that shows that the attacks work (one of them ends"
    yield "the supervisors of its neighbours, which then count as interrupted)."
    yield ""
    yield "| | " + " | ".join(levels) + " |"
    yield "|---|" + "---|" * len(levels)
    for name in (*EXPECTED, *ATTACK_NAMES):
        yield f"| {name.replace('_', ' ')} | " + " | ".join(outcome(seen[level][0].get(name)) for level in levels) + " |"
    yield "| processes left behind | " + " | ".join(str(len(seen[level][1])) for level in levels) + " |"
    yield ""
    yield "Reached: " + "; ".join(f"{level}: {seen[level][0]['fine'].isolation.details or 'nothing'}" for level in levels) + "."


if __name__ == "__main__":
    chosen = ["container"] if "docker" in sys.argv[1:] else []
    print("\n".join(lines([*chosen, *(["landlock"] if isolation.landlock_abi() else []), "convention"])))
