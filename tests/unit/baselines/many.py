"""Run many jobs of one method in one process, so that its imports are paid once: ``python many.py RUN_PY JOB_JSON...``.

Tests only; the harness gives every job a process of its own. A job that fails prints its traceback, and the rest go on.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

from harness.contract import Job


def main(program: str, *job_files: str) -> int:
    sys.path[0] = str(Path(program).parent)
    functions = runpy.run_path(program, run_name="method")
    failed = 0
    for job_file in job_files:
        job = Job.read(job_file)
        os.chdir(job.scratch)
        try:
            functions[job.stage](job)
        except Exception:
            failed += 1
            print(f"--- {job_file}", file=sys.stderr)
            traceback.print_exc()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
