"""From what a supervisor saw and a method wrote to the result of a stage (``stage.json``).

In: the supervisor's outcome and the method's output folder, read as hostile input. Out: a plain value with a ``state``
of design section 4 (ok, skipped, failed, timeout, oom, invalid_output, interrupted), a reason, and the outputs' digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import stat
import zipfile
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
MAX_EXTRA = 200
MAX_WORDS = 1000
MAX_COUNT = 1 << 63
LEAST_SECONDS = 1e-9
"""No step takes less: users a second must stay a number."""


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
            outputs = list_outputs(folder.out, job.budget.disk)
        except contract.ContractError:
            raise  # the domain's fault, not the method's
        except InvalidOutput as error:
            meta, outputs, state, reason = Meta(), [], "invalid_output", str(error)
        except Exception as error:  # whatever a hostile file makes numpy, zipfile or the system raise costs this run, and no other
            meta, outputs, state = Meta(), [], "invalid_output"
            reason = f"the output cannot be read ({type(error).__name__}: {error})"
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
    meta = contract.read_meta(out / META)
    check_recordable(meta)
    return meta


def check_recordable(meta: Meta) -> None:
    """Raises InvalidOutput for what JSON lets through and a record cannot hold: ``1e999``, numbers without end, half characters."""
    if len(meta.extra) > MAX_EXTRA:
        raise InvalidOutput(f"{META}: 'extra' has {len(meta.extra)} entries; at most {MAX_EXTRA} are recorded")
    numbers = {"parameters": meta.parameters, "steps": meta.steps, "epochs": meta.epochs, "peak_device_bytes": meta.peak_device_bytes}
    words = {"precision": meta.precision, "attention": meta.attention, **{f"the name {name!r:.50}": name for name in meta.extra}}
    for name, value in {**numbers, **words, **{f"extra.{name!r:.50}": value for name, value in meta.extra.items()}}.items():
        if isinstance(value, str) and (len(value) > MAX_WORDS or clean(value, MAX_WORDS) != value):
            raise InvalidOutput(f"{META}: {name} must be printable text of at most {MAX_WORDS} characters")
        if isinstance(value, int) and abs(value) >= MAX_COUNT:
            raise InvalidOutput(f"{META}: {name} is larger than 2^63")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidOutput(f"{META}: {name} is not a finite number")
    if any(0 < seconds < LEAST_SECONDS or seconds >= MAX_COUNT for seconds in meta.timings.values()):
        raise InvalidOutput(f"{META}: 'timings' holds seconds that no clock shows")


def _check_predictions(out: Path, job: Job) -> None:
    domain = Domain.read(job.domains[0].path)
    for name, users in ((PREDICTIONS, domain.test_users), (VALID_PREDICTIONS, domain.valid_users)):
        _check_compression(out / name, len(users) * (job.k + 1) * 8 + (1 << 16))
        contract.read_predictions(out / name, users, domain.n_items, job.k)


def _check_compression(path: Path, limit: int) -> None:
    """Only what numpy writes. zipfile unpacks bzip2 and LZMA without regard to the size asked for: 500 bytes become gigabytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(contract.read_regular(path, limit))) as archive:
            kinds = {info.compress_type for info in archive.infolist()}
    except InvalidOutput:
        raise
    except Exception:
        return  # no archive: read_predictions says so
    if not kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise InvalidOutput(f"{path.name} is packed in another way than numpy.savez and numpy.savez_compressed do; at most those are read")


def list_outputs(out: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Path, size and SHA-256 of every file a method left.

    Raises InvalidOutput for links, devices, FIFOs, too many files, more than ``most`` bytes (holes count: reading them takes
    as long), names that are not text, and what cannot be read at all.
    """
    found: list[dict[str, Any]] = []
    total = 0
    try:
        for root, folders, files in os.walk(out, onerror=_refuse):
            for name in (*folders, *files):
                path = Path(root, name)
                status = path.lstat()
                if clean(name, 255) != name:
                    raise InvalidOutput(f"{name!r:.100} is not a name of printable characters")
                if stat.S_ISDIR(status.st_mode):
                    continue
                if not stat.S_ISREG(status.st_mode):
                    raise InvalidOutput(f"{path.relative_to(out)} is not a regular file (a link, a FIFO or a device)")
                if status.st_nlink > 1:  # a later run of this method could change it through the other name
                    raise InvalidOutput(f"{path.relative_to(out)} is a hard link to another file; copy it")
                total += status.st_size
                if most is not None and total > most:
                    raise InvalidOutput(f"the output is longer than the disk budget of {most / 2**30:.2f} GiB")
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
