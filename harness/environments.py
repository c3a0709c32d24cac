"""Virtual environments of methods that bring a ``requirements.txt``; all others run in the project's environment.

In: methods. Out: the Python of each. An environment is named by the hash of its requirements, made once, and complete
only when its stamp is there: a half-made one is removed and made again. Requirements must carry hashes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.method import Method
from harness.paths import Paths
from harness.values import ConfigError

STAMP = ".complete"


def folder_of(method: Method, paths: Paths) -> Path | None:
    """Where the method's own environment lies, or None if it uses the project's."""
    if method.requirements is None:
        return None
    key = hashlib.sha256(method.requirements.read_bytes() + f"{sys.version_info[:2]}".encode()).hexdigest()[:12]
    return paths.environments / f"{method.name}-{key}"


def pythons(
    methods: Iterable[Method],
    paths: Paths,
    say: Callable[[str], None],
    *,
    missing: bool = True,
    broken: dict[str, ConfigError] | None = None,
) -> dict[str, Path]:
    """The Python of every method. ``missing``: make the environments that are not there (the Docker executor has its own).

    One that cannot be made raises, or lands in ``broken`` when that is given: it must not cost the other methods their runs.
    """
    found = {}
    for method in methods:
        folder = folder_of(method, paths)
        if missing and folder is not None and not (folder / STAMP).exists():
            say(f"making the environment of {method.name} (once): {folder}")
            try:
                make(method, folder)
            except ConfigError as error:
                if broken is None:
                    raise
                broken[method.name] = error
        found[method.name] = Path(sys.executable) if folder is None else folder / "bin" / "python"
    return found


def make(method: Method, folder: Path) -> None:
    """Make one environment. Raises ConfigError with what pip said."""
    assert method.requirements is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / STAMP).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        python = str(folder / "bin" / "python")
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "-r",
            str(method.requirements),
        ]
        for command in ([sys.executable, "-m", "venv", str(folder)], install, [python, "-c", "import numpy, pyarrow"]):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
            if done.returncode:
                said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
                raise ConfigError(
                    f"{method.requirements}: the environment of {method.name} cannot be made: `{' '.join(command[-3:])}` said:\n{said}\n"
                    "It must pin everything with hashes (uv pip compile --generate-hashes) and hold numpy and pyarrow, "
                    "which the contract needs."
                )
        (folder / STAMP).write_text("made whole\n")
