"""A method that breaks on purpose: the configuration's name says how. Everything else it does right."""

import ctypes
import io
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np

from harness.contract import PREDICTIONS, Job, Meta, main, skip, write_json, write_predictions


def fit(job: Job) -> None:
    domain = job.domain
    generator = np.random.default_rng(None if job.configuration["fault"] == "not_deterministic" else job.seed)
    lists_UK = generator.permuted(np.tile(np.arange(domain.n_items), (domain.n_users, 1)), axis=1)[:, : job.k]
    write_predictions(job, lists_UK)
    write_predictions(job, lists_UK, valid=True)
    Meta(timings={"fit": 0.0, "predict": 0.01}, stopped_by="not trained").write(job)
    FAULTS[job.configuration["fault"]](job, lists_UK)


def fine(job, lists_UK):
    pass


def crashes(job, lists_UK):
    raise RuntimeError("broken on purpose")


def hangs(job, lists_UK):
    time.sleep(3600)


def ignores_term(job, lists_UK):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)


def eats_memory(job, lists_UK):
    blocks = []
    while True:
        blocks.append(np.ones(8 << 20))  # 64 MiB, touched
        time.sleep(0.01)


def fills_disk(job, lists_UK):
    for part in range(100_000):
        (job.scratch / f"part{part}").write_bytes(os.urandom(1 << 22))
        time.sleep(0.005)


def floods_log(job, lists_UK):
    line = "x" * 1000
    for _ in range(60_000):
        print(line)


def no_output(job, lists_UK):
    (job.output / PREDICTIONS).unlink()


def wrong_shape(job, lists_UK):
    write_predictions(job, lists_UK[:, :10])


def duplicate_items(job, lists_UK):
    lists_UK[3, 7] = lists_UK[3, 2]
    write_predictions(job, lists_UK)


def out_of_range(job, lists_UK):
    lists_UK[0, 0] = job.domain.n_items
    write_predictions(job, lists_UK)


def missing_users(job, lists_UK):
    write_predictions(job, lists_UK[:-1])


def not_a_number(job, lists_UK):
    np.savez(job.output / PREDICTIONS, users=np.arange(len(lists_UK)), items=np.full(lists_UK.shape, np.nan))


def bad_meta(job, lists_UK):
    write_json(job.output / "meta.json", {"recall_at_10": 1.0})


def leaves_daemon(job, lists_UK):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True, env={})


def output_link(job, lists_UK):
    (job.output / PREDICTIONS).unlink()
    (job.output / PREDICTIONS).symlink_to("/etc/passwd")


def output_hard_link(job, lists_UK):
    os.link(job.output / PREDICTIONS, job.output / "again.npz")


def output_fifo(job, lists_UK):
    (job.output / PREDICTIONS).unlink()
    os.mkfifo(job.output / PREDICTIONS)


def output_pickle(job, lists_UK):
    items = np.empty(lists_UK.shape, object)
    np.savez(job.output / PREDICTIONS, users=np.arange(len(lists_UK)), items=items)


def output_gigabytes(job, lists_UK):
    with open(job.output / PREDICTIONS, "wb") as file:
        file.truncate(8 << 30)


def output_megabytes(job, lists_UK):
    with open(job.output / PREDICTIONS, "r+b") as file:
        file.truncate(150 << 20)


def zip_bomb(job, lists_UK):
    data = io.BytesIO()
    np.save(data, np.arange(len(lists_UK)))
    with zipfile.ZipFile(job.output / PREDICTIONS, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("users.npy", data.getvalue())
        archive.writestr("items.npy", bytes(1 << 28))


def segfault(job, lists_UK):
    ctypes.string_at(0)


def nameless_signal(job, lists_UK):
    os.kill(os.getpid(), 40)  # a real-time signal


def prints_for_ever(job, lists_UK):
    for _ in range(3):
        if os.fork() == 0:
            break
    while True:
        os.write(1, bytes(1 << 20))


def meta_infinity(job, lists_UK):
    (job.output / "meta.json").write_text('{"extra": {"rate": 1e999}}')


def kills_supervisor(job, lists_UK):
    """Ends the supervisors of its own results folder, its own among them, where it can see and signal them."""
    parents = job.output.parents
    results = str(parents[min(3, len(parents) - 1)]).encode()  # in a container of its own: all of it
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read()
            if b"harness.supervise" in command and results in command and int(name) not in (1, os.getpid()):
                os.kill(int(name), signal.SIGKILL)
        except OSError:
            continue
    time.sleep(0.2)


def skips(job, lists_UK):
    skip(job, "needs a unicorn, and this domain has none")


def not_deterministic(job, lists_UK):
    pass


FAULTS = {name: value for name, value in globals().items() if callable(value) and getattr(value, "__module__", None) == __name__}

if __name__ == "__main__":
    main(fit)
