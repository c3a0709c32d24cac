"""The harness as a process of its own, for tests that kill it: ``python -m tests.faults.drive ROOT SLOTS``."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.paths import PROJECT, Paths
from harness.suite import Entry
from tests.faults import lab


def paths_of(root: Path) -> Paths:
    return Paths(PROJECT, root / "data", root / "results", (root / "methods",))


def plan_of(root: Path) -> lab.Plan:
    return lab.make_fake_plan(paths_of(root), [Entry(method="slow", configs=("a", "b", "c"))], seeds=8, seconds=30, grace=30)


def main() -> None:
    root, slots = Path(sys.argv[1]), int(sys.argv[2])
    lab.carry_out(plan_of(root), paths_of(root), slots=slots)


if __name__ == "__main__":
    main()
