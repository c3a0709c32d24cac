"""From what a supervisor saw and a method wrote to the result of a stage (``stage.json``).

In: the supervisor's outcome and the method's output folder, read as hostile input. Out: a plain value with a ``state``
of design section 4 (ok, skipped, failed, timeout, oom, invalid_output, interrupted), a reason, and the outputs' digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from harness import contract
from harness.contract import EXIT_SKIPPED, META, PREDICTIONS, SKIPPED, VALID_PREDICTIONS, Domain, InvalidOutput, Job, Meta
from harness.execute.stage import StageFolder
from harness.paths import Paths

LOG_TAIL = 4000
OUT_OF_MEMORY = (
    "MemoryError",
    "OutOfMemoryError",
    "CUDA out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory",
)
MAX_FILES = 10_000


def read_stage_result(outcome: dict[str, Any], folder: StageFolder, job: Job, paths: Paths, last: bool) -> dict[str, Any]:
    """The result of a stage that has just ended. ``last``: it must have left predictions."""
    tail = log_tail(folder.log)
    state, reason = classify(outcome, tail)
    meta, outputs = Meta(), []
    if state == "skipped":
        reason = _skip_reason(folder)
    if state == "ok":
        try:
            meta = _read_meta(folder.out, required=last)
            if last:
                _check_predictions(folder.out, job)
            outputs = list_outputs(folder.out)
        except InvalidOutput as error:
            state, reason = "invalid_output", str(error)
    return {
        "state": state,
        "reason": clean(reason, 1000),
        "exit_code": outcome["exit_code"],
        "signal": outcome["signal"],
        "seconds": round(outcome["seconds"], 4),
        "cpu_seconds": round(outcome["cpu_seconds"], 4),
        "peak_memory": outcome["peak_memory"],
        "beside": outcome.get("beside", False),
        "isolation": outcome.get("isolation") or {},
        "log_tail": tail if state not in ("ok", "skipped") else "",
        "meta": dataclasses.asdict(meta),
        "outputs": outputs,
    }


def classify(outcome: dict[str, Any], tail: str) -> tuple[str, str]:
    """(state, reason) from how the process ended."""
    by, code = outcome["ended_by"], outcome["exit_code"]
    states = {"deadline": "timeout", "memory": "oom", "disk": "failed", "lifeline": "interrupted", "supervisor": "failed"}
    if by != "exit":
        return states[by], outcome["reason"]
    if code == 0:
        return "ok", ""
    if code == EXIT_SKIPPED:
        return "skipped", ""
    last_line = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")
    if any(sign in last_line for sign in OUT_OF_MEMORY):
        return "oom", last_line
    if outcome["signal"]:
        return "failed", f"ended by {outcome['signal']}" + (f": {outcome['reason']}" if outcome["reason"] else "")
    if code is None:
        return "failed", outcome["reason"]
    return "failed", f"exit status {code}: {last_line}" if last_line else f"exit status {code}, without a word"


def clean(text: str, limit: int) -> str:
    """Text that a method wrote, fit for a terminal: control characters out, length capped."""
    text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def log_tail(path: Path, size: int = LOG_TAIL) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return clean(file.read().decode(errors="replace"), size)
    except OSError:
        return ""


def _skip_reason(folder: StageFolder) -> str:
    try:
        return contract.read_regular(folder.out / SKIPPED, contract.MAX_REASON_BYTES).decode(errors="replace")
    except InvalidOutput:
        return "the method gave no reason"


def _read_meta(out: Path, required: bool) -> Meta:
    if not required and not (out / META).exists():
        return Meta()
    return contract.read_meta(out / META)


def _check_predictions(out: Path, job: Job) -> None:
    domain = Domain.read(job.domains[0].path)
    for name in (PREDICTIONS, VALID_PREDICTIONS):
        contract.read_predictions(out / name, domain.n_users, domain.n_items, job.k)


def list_outputs(out: Path) -> list[dict[str, Any]]:
    """Path, size and SHA-256 of every file a method left.

    Raises InvalidOutput for links, devices, FIFOs, too many files, and what cannot be read at all.
    """
    found: list[dict[str, Any]] = []
    try:
        for root, folders, files in os.walk(out, onerror=_refuse):
            for name in (*folders, *files):
                path = Path(root, name)
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode):
                    continue
                if not stat.S_ISREG(mode):
                    raise InvalidOutput(f"{path.relative_to(out)} is not a regular file (a link, a FIFO or a device)")
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append({"path": str(path.relative_to(out)), "bytes": path.stat().st_size, "sha256": digest})
                if len(found) > MAX_FILES:
                    raise InvalidOutput(f"more than {MAX_FILES:,} output files")
    except OSError as error:
        raise InvalidOutput(f"the output folder cannot be read: {error.strerror}: {Path(error.filename or out).name}") from error
    return sorted(found, key=lambda entry: entry["path"])


def _refuse(error: OSError) -> None:
    raise error
