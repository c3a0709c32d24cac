"""`harness doctor`: what this machine can do, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import isolation, provenance
from harness.method import find_methods
from harness.paths import Paths
from harness.values import ConfigError

GOOD, NOTE, BAD = "ok", "note", "bad"
STYLES = {GOOD: "green", NOTE: "yellow", BAD: "red"}
Finding = tuple[str, str, str]
"""(state, what was found, the command or step that mends it)"""

PACKAGES = ("torch", "transformers", "accelerate", "peft", "recbole", "mlflow", "pandas", "pyarrow", "polars", "docker")
OPTIONAL_PACKAGES = ("deepspeed", "flash-attn", "sentence-transformers")
ISOLATION_WORDS = {
    "container": "the worker container: no network, read-only root, no private data",
    "landlock": f"Landlock (ABI {isolation.landlock_abi()}): methods read and write only what they are given",
    "user": "another user: methods cannot read private data",
    "convention": "none: methods are trusted not to look",
}


def examine(console: Console) -> int:
    """Returns 1 if anything is bad."""
    checks: dict[str, Callable[[], Finding]] = {
        "Python": _python,
        "packages": _packages,
        "GPU": _gpu,
        "memory": _memory,
        "disk": _disk,
        "compiler": _compiler,
        "Docker": _docker,
        "isolation": _isolation,
        "methods": _methods,
        "domains": _domains,
        "MLflow": _mlflow,
    }
    table = Table(title="harness doctor")
    for name in ("", "what", "found", "mend"):
        table.add_column(name, overflow="fold")
    worst = 0
    for name, check in checks.items():
        state, found, mend = check()
        worst = max(worst, state == BAD)
        table.add_row(Text(state, style=STYLES[state]), name, Text(found), Text(mend))
    console.print(table)
    return int(worst)


def _python() -> Finding:
    version = sys.version.split()[0]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return BAD, version, "use Python 3.11 or 3.12 and `make venv`"
    return GOOD, f"{version} ({sys.executable})", ""


def _packages() -> Finding:
    found, missing = [], []
    for name in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    needed = [name for name in missing if name in PACKAGES]
    text = ", ".join(found) + (f"; not there: {', '.join(missing)}" if missing else "")
    return (BAD, text, "make venv") if needed else (GOOD, text, "")


def _gpu() -> Finding:
    cards = provenance.gpus()
    torch = provenance.packages().get("torch", "")
    if not cards:
        return (
            NOTE,
            "none (nvidia-smi lists no GPU): everything runs on the CPU",
            "with Docker: COMPOSE_FILE line in .env (see .env.example)",
        )
    if "+cpu" in torch:
        return BAD, f"{len(cards)} x {cards[0][0]}, but torch {torch} is a CPU build", "rm -rf .venv && make venv DEVICE=cuda"
    return GOOD, f"{len(cards)} x {cards[0][0]}, {cards[0][1]}, driver {cards[0][2]}", ""


def _memory() -> Finding:
    gib = provenance.memory_bytes() / 2**30
    return (
        (NOTE if gib < 8 else GOOD),
        f"{gib:.1f} GiB, {provenance.cpu_count()} cores ({provenance.cpu_model()})",
        "--jobs 1 if runs end with oom" if gib < 8 else "",
    )


def _disk() -> Finding:
    results = Paths.default().results
    place = next(path for path in (results, *results.parents) if path.exists())
    gib = shutil.disk_usage(place).free / 2**30
    return (
        (BAD if gib < 2 else NOTE if gib < 20 else GOOD),
        f"{gib:.0f} GiB free at {place}",
        "free some, or set HARNESS_RESULTS to another disk" if gib < 20 else "",
    )


def _compiler() -> Finding:
    missing = [name for name in ("g++", "ninja") if not shutil.which(name) and not os.path.exists(os.path.join(sys.prefix, "bin", name))]
    if missing:
        return (
            NOTE,
            f"not there: {', '.join(missing)} (needed by DeepSpeed on the CPU and by torch.compile)",
            "sudo apt-get install g++ ninja-build",
        )
    return GOOD, "g++ and ninja", ""


def _docker() -> Finding:
    if not shutil.which("docker"):
        return NOTE, "no docker command; `make benchmark` works without", "install Docker Engine with the compose plugin"
    try:
        command = ["docker", "info", "--format", "{{.ServerVersion}}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return NOTE, "the engine does not answer", "sudo systemctl restart docker"
    if done.returncode:
        return NOTE, "no engine answers", "sudo systemctl start docker; add yourself to the group docker"
    return GOOD, f"engine {done.stdout.strip()}", ""


def _isolation() -> Finding:
    level = isolation.best_level()
    if level == "convention":
        return NOTE, ISOLATION_WORDS[level], "docker compose up benchmark, or a kernel with Landlock (5.13 or newer)"
    return GOOD, ISOLATION_WORDS.get(level, level), ""


def _methods() -> Finding:
    broken: dict[str, ConfigError] = {}
    methods = find_methods(Paths.default(), broken=broken)
    configs = sum(len(method.configs) for method in methods.values())
    if broken:
        return BAD, f"{len(methods)} methods; broken: {', '.join(broken)}", "; ".join(str(error) for error in broken.values())
    return GOOD, f"{len(methods)} methods with {configs} configurations: {', '.join(methods)}", ""


def _domains() -> Finding:
    names = sorted(path.parent.parent.name for path in Paths.default().data.glob("*/public/domain.json"))
    if not names:
        return NOTE, "none prepared yet", "harness data simulate, or harness data import FOLDER"
    return GOOD, ", ".join(names), ""


def _mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return GOOD, uri or f"a local server, started when needed, on {Paths.default().results / 'mlflow'}", ""
