"""What decoding costs: ours, the peers, and the matrix products alone. One command on a CPU, one on a GPU.

    python -m tests.benchmarks.decoding                  # two cores: floor, ours, generate, a plain beam search, memory
    python -m tests.benchmarks.decoding --device cuda    # 223,308 users at beam 50, fp32 and bf16, floor, rank agreement

The setting is the issue's: T5 with d 128, 4+4 layers, 6 x 64 heads, d_ff 1024; 4 codes of 256, 12,000 items, beam 50, random
weights. ``full``: every history has 20 items (81 tokens). ``mixed``: 2 to 20, drawn evenly.

The floor is the matrix products that textbook beam search does, on the same shapes, written into memory that is there:
encoder, keys and values, 1 + K + K + K decoder rows, attention products, the head over the vocabulary. Softmax, norms,
residuals, look-ups and search are not in it. Ours may go below: it looks up what the first layers compute (inference.py).

Times are process CPU seconds a user (on a GPU wall seconds), the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tests.generative import World, world
from utgrec.recommender.data import Histories
from utgrec.recommender.decode import Search, batches, in_threads, one_core_a_thread, recommend
from utgrec.recommender.inference import PRECISIONS, Weights
from utgrec.recommender.model import Shape

BEAMS, WIDTHS, ITEMS = 50, (256, 256, 256, 256), 12_000
PEER_BATCHES = (1, 2, 4, 8, 16, 64)


def setting(users: int, lengths: Literal["full", "mixed"] = "full") -> World:
    return world(items=ITEMS, users=users, widths=WIDTHS, shortest=20 if lengths == "full" else 2, seed=7)


def first(histories: Histories, users: int) -> Histories:
    """The first of the users."""
    part = object.__new__(Histories)
    part.__dict__ = histories.__dict__ | {name: getattr(histories, name)[:users] for name in ("start_R", "count_R", "users_R")}
    return part


# -------------------------------------------------------------------------------------------------------- the floor


def products(shape: Shape, users: int, length: int, steps: int, beams: int) -> list[tuple[int, ...]]:
    """(rows, inner, columns) of each product, (count, rows, inner, columns) of each batch of small ones."""
    D, F, I, H, E = shape.d_model, shape.d_ff, shape.inner, shape.heads, shape.d_kv

    def layer(rows: int, seen: int, cross: bool) -> list[tuple[int, ...]]:
        attention = [(users * H, rows // users, E, seen), (users * H, rows // users, seen, E)]
        own = [(rows, D, 3 * I), (rows, I, D), (rows, D, F), (rows, F, D)]
        return own + attention + ([(rows, D, I), (rows, I, D)] if cross else [])

    out = [part for _ in range(shape.encoder_layers) for part in layer(users * length, length, cross=False)]
    out += [(users * length, D, 2 * I)] * shape.decoder_layers
    for step in range(steps):
        rows = users * (beams if step else 1)
        out += [part for _ in range(shape.decoder_layers) for part in layer(rows, length, cross=True)]
        out.append((rows, D, shape.vocabulary))
    return out


class Floor:
    """The products of one batch, ready to run."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype):
        self.flops = sum(2 * int(np.prod(shape)) for shape in shapes)
        made = {shape: self._operands(shape, device, dtype) for shape in set(shapes)}
        self.runs = [(torch.mm if len(shape) == 3 else torch.bmm, made[shape]) for shape in shapes]

    @staticmethod
    def _operands(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        *count, rows, inner, columns = shape
        pairs = ((rows, inner), (inner, columns), (rows, columns))
        return tuple(torch.randn(*count, *pair, device=device, dtype=dtype) for pair in pairs)

    @torch.inference_mode()
    def __call__(self) -> None:
        for product, (a, b, out) in self.runs:
            product(a, b, out=out)


# ---------------------------------------------------------------------------------------------------------- the CPU


def cpu_ms(work: Callable[[], Any], users: int, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        begin = time.process_time()
        work()
        return 1e3 * (time.process_time() - begin) / users
    finally:
        torch.set_num_threads(before)


def tuned_peer(made: World, users: int = 8) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of ``generate`` that cost the least CPU time, found one after the other, and all that was tried."""
    from tests.benchmarks.peers import generate as peer

    tokens_IL = made.ids.tokens_IL + made.first_code
    callbacks = {"walk": peer.walk(tokens_IL), "dictionary": peer.dictionary(tokens_IL)}
    tried: list[dict[str, Any]] = []

    def cost(batch: int, attention: str, callback: str, threads: int) -> float:
        theirs, some = peer.hugging_face(made.model, attention), first(made.histories, max(users, batch))
        work = lambda: peer.generate(theirs, some, len(WIDTHS), BEAMS, batch, callbacks[callback])  # noqa: E731
        value = min(cpu_ms(work, len(some), threads) for _ in range(1 if batch > users else 2))
        tried.append({"batch": batch, "attention": attention, "callback": callback, "threads": threads, "cpu_ms": round(value, 1)})
        return value

    best = {"batch": 4, "attention": "sdpa", "callback": "walk", "threads": 1}
    for name, values in (
        ("batch", PEER_BATCHES),
        ("attention", ("sdpa", "eager")),
        ("callback", ("walk", "dictionary")),
        ("threads", (1, 2)),
    ):
        best[name] = min(values, key=lambda value: cost(**{**best, name: value}))
    return best, tried


def groups(made: World, device: str, precision: str, threads: int) -> Counter[tuple[int, int]]:
    """How many batches of (users, longest history) ours makes of these users."""
    made.model.to(device)
    search = Search(Weights.of(made.model, precision), made.trie.to(device), BEAMS, made.first_code, True, 0)
    lengths = made.histories.lengths
    return Counter((len(rows), int(lengths[rows].max())) for rows, _ in batches(lengths, lambda length: search.room(length, threads)))


def measure_cpu(
    lengths: Literal["full", "mixed"], users: int, peer_users: int, rounds: int, peer_settings: dict[str, Any]
) -> dict[str, Any]:
    """Medians over interleaved rounds, CPU ms a user; ratios are medians of the rounds' ratios. Ranks are compared first."""
    from tests.benchmarks.peers import generate as peer
    from tests.benchmarks.peers.plain_beam import plain

    made = setting(users, lengths)
    some, tokens_IL = first(made.histories, peer_users), made.ids.tokens_IL + made.first_code
    theirs = peer.hugging_face(made.model, peer_settings["attention"])
    callback = getattr(peer, peer_settings["callback"])(tokens_IL)
    shapes = groups(made, "cpu", "fp32", 2)
    needed = {key: products(made.model.shape, *key, len(WIDTHS), BEAMS) for key in shapes}
    floors = [{key: Floor(part, "cpu", torch.float32) for key, part in needed.items()} for _ in range(2)]
    few = 4 if lengths == "full" else 1  # a quarter of equal batches is enough
    todo = [key for key, count in shapes.items() for _ in range(-(-count // few))]

    def floor() -> None:
        """In two threads, like ours, each with memory of its own."""
        keys, sets = iter(todo), iter(floors)

        def work() -> None:
            mine = next(sets)
            for key in keys:
                mine[key]()

        with one_core_a_thread():
            in_threads(work, keys, 2)

    ours = lambda histories=made.histories, **how: recommend(made.model, made.trie, histories, k=BEAMS, beams=BEAMS, **how)  # noqa: E731
    generate = lambda: peer.generate(theirs, some, len(WIDTHS), BEAMS, peer_settings["batch"], callback)  # noqa: E731

    codes_UKL, _ = generate()
    expected_UK = made.trie.lookup(torch.from_numpy(codes_UKL - made.first_code - made.ids.offset_L)).numpy()
    equal = float((ours(some).items_UK == expected_UK).mean())
    times: dict[str, list[float]] = {"floor": [], "ours": [], "ours, bf16": [], "plain": [], "generate": []}
    for _ in range(rounds):
        times["floor"].append(cpu_ms(floor, sum(size for size, _ in todo), 2))
        times["ours"].append(cpu_ms(ours, users, 2))
        times["ours, bf16"].append(cpu_ms(lambda: ours(precision="bf16"), users, 2))
        times["plain"].append(cpu_ms(lambda: plain(made.model, made.trie, some, BEAMS, 16, made.first_code), peer_users, 1))
        times["generate"].append(cpu_ms(generate, peer_users, peer_settings["threads"]))
    begin = time.perf_counter()
    exact = ours()
    wall = time.perf_counter() - begin
    gflop = sum(floors[0][key].flops * count for key, count in shapes.items()) / users / 1e9
    ratio = lambda over, under: statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))  # noqa: E731
    return {
        "lengths": lengths,
        "users": users,
        "gflop_a_user": round(gflop, 3),
        "cpu_ms": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "users_a_second": round(users / wall, 1),
        "floor_gflops": round(gflop / statistics.median(times["floor"]) * 1e3, 1),
        "share_of_floor": round(ratio("floor", "ours"), 3),
        "times_generate": round(ratio("generate", "ours"), 2),
        "times_plain": round(ratio("plain", "ours"), 2),
        "equal_ranks": equal,
        "bf16": agreement(exact.items_UK, ours(precision="bf16").items_UK),
    }


def agreement(exact_UK: np.ndarray, other_UK: np.ndarray) -> dict[str, float]:
    """How far two sets of lists agree: the first place, the ten first as sets, all places in order."""
    shared = (exact_UK[:, :10, None] == other_UK[:, None, :10]).any(2).mean()
    whole = (exact_UK[:, :, None] == other_UK[:, None, :]).any(2).mean()
    first_place = (exact_UK[:, 0] == other_UK[:, 0]).mean()
    values = {"first": first_place, "shared_10": shared, "shared_all": whole, "same_rank": (exact_UK == other_UK).mean()}
    return {name: round(float(value), 4) for name, value in values.items()}


def memory(who: str, batch: int | None) -> int:
    """Peak resident bytes beyond those before decoding. To be called in a process of its own."""
    made = setting(256 if who == "ours" else max(8, 2 * (batch or 1)))
    if who == "ours":
        work = lambda: recommend(made.model, made.trie, made.histories, k=BEAMS, beams=BEAMS, batch=batch)  # noqa: E731
    else:
        from tests.benchmarks.peers import generate as peer

        theirs, callback = peer.hugging_face(made.model), peer.walk(made.ids.tokens_IL + made.first_code)
        work = lambda: peer.generate(theirs, made.histories, len(WIDTHS), BEAMS, batch or 64, callback)  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here; ru_maxrss would begin with that of the parent
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes, of this process, now (``VmRSS``) or at the most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def memory_apart(who: str, batch: int | None = None) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.decoding", "--memory", who, *(["--batch", str(batch)] if batch else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# ---------------------------------------------------------------------------------------------------------- the GPU


def measure_cuda(users: int, rounds: int = 3) -> dict[str, Any]:
    """Wall seconds for all users, the floor on the same batches, and what bf16 changes."""
    made = setting(users, "mixed")
    made.model.cuda()
    out: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "users": users}
    lists = {}

    def seconds(work: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    for precision, dtype in PRECISIONS.items():
        shapes = groups(made, "cuda", precision, 1)

        def ours(precision: str = precision) -> None:
            lists[precision] = recommend(made.model, made.trie, made.histories, k=BEAMS, beams=BEAMS, precision=precision).items_UK

        ours()
        torch.cuda.reset_peak_memory_stats()
        taken = statistics.median(seconds(ours) for _ in range(rounds))
        peak, floor, flops = torch.cuda.max_memory_allocated(), 0.0, 0
        for key, count in shapes.items():
            run = Floor(products(made.model.shape, *key, len(WIDTHS), BEAMS), "cuda", dtype)
            run()
            floor += count * statistics.median(seconds(run) for _ in range(5))
            flops += count * run.flops
        out[precision] = {
            "seconds": round(taken, 2),
            "users_a_second": round(users / taken),
            "floor_seconds": round(floor, 2),
            "floor_tflops": round(flops / floor / 1e12, 1),
            "share_of_floor": round(floor / taken, 3),
            "peak_device_bytes": peak,
        }
    out["bf16_agreement"] = agreement(lists["fp32"], lists["bf16"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--users", type=int, default=0, help="512 on a CPU, 223,308 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=("ours", "generate"), help="print the peak bytes of one of them")
    parser.add_argument("--batch", type=int)
    how = parser.parse_args()
    if how.memory:
        print(memory(how.memory, how.batch))
    elif how.device == "cuda":
        print(json.dumps(measure_cuda(how.users or 223_308), indent=1))
    else:
        best, tried = tuned_peer(setting(max(PEER_BATCHES)))
        print(json.dumps({"generate": best, "tried": tried}, indent=1), flush=True)
        for lengths in ("full", "mixed"):
            print(json.dumps(measure_cpu(lengths, how.users or 512, 16, how.rounds, best), indent=1), flush=True)
        print(
            json.dumps(
                {"ours": memory_apart("ours"), **{f"generate {b}": memory_apart("generate", b) for b in (best["batch"], 64)}}, indent=1
            )
        )


if __name__ == "__main__":
    main()
