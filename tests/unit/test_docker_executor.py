"""What the Docker executor does without an engine: its errors, and what it makes of a container's end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.execute.docker import DockerExecutor, _outcome
from harness.execute.local import interrupted
from harness.paths import Paths
from harness.values import ConfigError


def test_without_an_engine_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(ConfigError, match="`docker info`"):
        DockerExecutor(Paths(tmp_path, tmp_path, tmp_path / "results", ()))


FRAMES = b"\x02\0\0\0\0\0\0\x07Traceba\x02\0\0\0\0\0\0\x07ck: why"
EXIT = interrupted("") | {"ended_by": "exit"}


@pytest.mark.parametrize(
    ("status", "killed_by_kernel", "ended_by"),
    [
        (EXIT | {"exit_code": 0}, False, "exit"),
        (EXIT | {"exit_code": 0}, True, "exit"),  # one of its helpers was killed and it coped
        (EXIT | {"signal": "SIGKILL"}, False, "exit"),
        (EXIT | {"signal": "SIGKILL"}, True, "memory"),
        (EXIT | {"ended_by": "deadline"}, True, "deadline"),
        (None, True, "memory"),
        (None, False, "lifeline"),
    ],
)
def test_how_a_container_ended(tmp_path: Path, status: dict[str, Any] | None, killed_by_kernel: bool, ended_by: str) -> None:
    path = tmp_path / "status.json"
    if status:
        path.write_text(json.dumps(status))
    outcome = _outcome(path, {"OOMKilled": killed_by_kernel, "ExitCode": 137}, FRAMES)
    assert outcome["ended_by"] == ended_by
    if ended_by == "lifeline":
        assert "137" in outcome["reason"]
        assert outcome["reason"].endswith("Traceback: why")
