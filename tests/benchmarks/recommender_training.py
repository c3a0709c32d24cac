"""The training step of the recommender beside Hugging Face's Trainer: same model, same rows in the same order, same batches.

    python tests/benchmarks/recommender_training.py                      two CPU threads, fp32
    python tests/benchmarks/recommender_training.py --precision bf16
    python tests/benchmarks/recommender_training.py --device cuda --precision bf16    every way of running it on a GPU

Rows are those of office2014 with the first four of its given codes where the domain is prepared, else made-up rows of the same
lengths. Ours and theirs take turns; a figure is the median over the repeats, of the mean over a repeat's steps without its
first. ``cpu`` is the time of all threads of the process. test_recommender_training.py holds the limits (``make bench``).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from harness.contract import Domain, Ragged  # noqa: E402
from tests.benchmarks.peers.hugging_face_trainer import Clock, Curve  # noqa: E402
from tests.benchmarks.peers.hugging_face_trainer import train as train_theirs  # noqa: E402
from utgrec.recommender.data import Histories, stairs  # noqa: E402
from utgrec.recommender.fused import Layout  # noqa: E402
from utgrec.recommender.model import T5, Shape  # noqa: E402
from utgrec.semantic_ids import SemanticIds  # noqa: E402

OFFICE = ROOT / "data" / "domains" / "office2014" / "public"
ROWS_OF_1_TO_20_ITEMS = (
    *(4905, 4905, 3609, 2851, 2413, 2084, 1813, 1576, 1417, 1256),
    *(1114, 1005, 893, 801, 727, 656, 599, 545, 479, 4895),
)
"""Training rows of office2014 by the number of items in their history."""


@dataclass(frozen=True)
class Setting:
    device: str = "cpu"
    precision: str = "fp32"
    batch: int = 256
    steps: int = 2
    """Of a repeat, without its first."""
    repeats: int = 5
    threads: int = 2
    dropout: float = 0.1


def histories() -> Histories:
    if OFFICE.is_dir():
        domain = Domain.read(OFFICE)
        codes_IL = SemanticIds.imported(domain, "codes_rqkmeans").codes_IL[:, :4]
        return Histories.training(domain, SemanticIds.of(codes_IL, (256,) * 4))
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.repeat(np.arange(1, 21), ROWS_OF_1_TO_20_ITEMS))
    inputs = Ragged(rng.integers(0, 2420, counts.sum()), np.concatenate([[0], np.cumsum(counts)]))
    ids = SemanticIds.of(rng.integers(0, 256, (2420, 4)), (256,) * 4)
    return Histories(inputs, ids, np.arange(len(counts)), rng.integers(0, 2420, len(counts)))


def plain_rows(rows: Histories, indices: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """(tokens, codes) of each row, as the peer's data set wants them."""
    assert rows.targets_R is not None
    codes = rows.tokens_IL[rows.targets_R[indices]].tolist()
    tokens = zip(rows.rows(indices).tolist(), rows.lengths[indices], strict=True)
    return [(row[:length], code) for (row, length), code in zip(tokens, codes, strict=True)]


# ---------------------------------------------------------------------------------------------------------- our side


def train_ours(
    model: T5,
    rows: Histories,
    indices: np.ndarray,
    setting: Setting,
    *,
    forward: Callable[..., torch.Tensor] | None = None,
    layout: Layout | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
) -> Curve:
    """One pass over the rows, as the training loop does it. ``layout``: put every batch into it (GPU)."""
    forward = model if forward is None else forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    model.train()
    losses, clock = [], Clock(setting.device, len(indices) // setting.batch)
    for rows_B in np.split(indices, len(indices) // setting.batch):
        batch = rows.batch(rows_B)
        if layout is not None:
            batch = batch.into(layout)
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = forward(*batch.to(setting.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
        clock.tick()
    return clock.curve(losses)


def compiled(rows: Histories, indices: np.ndarray, setting: Setting, layout: Layout, mode: str) -> Callable[[], Curve]:
    """The step through ``torch.compile``, compiled before the clock runs."""
    model = fresh(rows, setting.dropout, setting.device)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    forward = torch.compile(model, dynamic=False, mode=mode)
    train_ours(model, rows, np.tile(indices[: setting.batch], 4), setting, forward=forward, layout=layout)

    def run() -> Curve:
        model.load_state_dict(first)
        return train_ours(model, rows, indices, setting, forward=forward, layout=layout)

    return run


def captured(rows: Histories, indices: np.ndarray, setting: Setting, layout: Layout, compile_too: bool) -> Callable[[], Curve]:
    """The whole step, optimizer included, as one CUDA graph that is replayed: how fast it can be without any launches."""
    model = fresh(rows, setting.dropout, "cuda").train()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    forward = torch.compile(model, dynamic=False) if compile_too else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), weight_decay=0.05, fused=True, capturable=True)
    static = rows.batch(indices[: setting.batch]).into(layout).to("cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = forward(*static)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def run() -> Curve:
        model.load_state_dict(first)  # in place: the graph reads and writes this memory
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        losses, clock = [], Clock("cuda", len(indices) // setting.batch)
        for rows_B in np.split(indices, len(indices) // setting.batch):
            batch = rows.batch(rows_B).into(layout)
            if batch.layout != static.layout:
                raise ValueError("a batch does not fit into the layout; choose other rows")
            static.tokens_N.copy_(batch.tokens_N.pin_memory(), non_blocking=True)
            static.codes_BL.copy_(batch.codes_BL.pin_memory(), non_blocking=True)
            graph.replay()
            losses.append(loss.clone())
            clock.tick()
        return clock.curve(losses)

    return run


# --------------------------------------------------------------------------------------------------------- the floor


def products(shape: Shape, layout: Layout, codes: int = 4) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(how often, (batch, m, k, n)) of every matrix product of a step on packed rows, forward and backward.

    A forward product m x k x n has two in its backward: m x n x k and k x m x n.
    """
    D, F, I, H, E = shape.d_model, shape.d_ff, shape.inner, shape.heads, shape.d_kv
    tokens, rows = sum(count * length for count, length in layout), sum(count for count, _ in layout)
    T = rows * codes
    forward = [(shape.encoder_layers, (1, tokens, *kn)) for kn in ((D, 3 * I), (I, D), (D, F), (F, D))]
    forward += [(shape.decoder_layers, (1, T, *kn)) for kn in ((D, 3 * I), (I, D), (D, I), (I, D), (D, F), (F, D))]
    forward += [(shape.decoder_layers, (H, T, *kn)) for kn in ((E, D), (D, E))]  # cross-attention: queries through the keys' weights
    forward += [(1, (1, T, D, shape.vocabulary))]
    for count, S in layout:
        forward += [(shape.encoder_layers, (count * H, S, E, S)), (shape.encoder_layers, (count * H, S, S, E))]
        forward += [(shape.decoder_layers, (count, codes * H, D, S)), (shape.decoder_layers, (count, codes * H, S, D))]
    forward += [(shape.decoder_layers, (rows * H, codes, E, codes)), (shape.decoder_layers, (rows * H, codes, codes, E))]
    return [(often, one) for often, (b, m, k, n) in forward for one in ((b, m, k, n), (b, m, n, k), (b, k, m, n))]


def floor(shape: Shape, layout: Layout, setting: Setting) -> dict[str, float]:
    """Seconds of the matrix products alone, each the best of several, results written to memory already there."""
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    wall = cpu = flops = 0.0
    for often, (b, m, k, n) in products(shape, layout):
        x, y = torch.randn(b, m, k).to(dtype), torch.randn(b, k, n).to(dtype)
        out = torch.empty(b, m, n, dtype=dtype)
        product, operands = (torch.bmm, (x, y, out)) if b > 1 else (torch.mm, (x[0], y[0], out[0]))
        product(*operands[:2], out=operands[2])
        times = []
        for _ in range(5):
            start = time.perf_counter(), time.process_time()
            product(*operands[:2], out=operands[2])
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        best = np.min(times, axis=0)
        wall, cpu, flops = wall + often * best[0], cpu + often * best[1], flops + often * 2.0 * b * m * k * n
    return {"wall": wall, "cpu": cpu, "gflop": flops / 1e9}


# ------------------------------------------------------------------------------------------------------ measurements


def fresh(rows: Histories, dropout: float, device: str = "cpu") -> T5:
    torch.manual_seed(0)
    return T5(Shape(rows.vocabulary, dropout=dropout)).to(device)


def take_turns(sides: dict[str, Callable[[], Curve]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds a step of every side."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            curve = side()
            seconds[name].append((statistics.mean(curve.seconds), statistics.mean(curve.cpu_seconds)))
    return {name: dict(zip(("wall", "cpu"), np.median(values, axis=0).tolist(), strict=True)) for name, values in seconds.items()}


def on_cpu(setting: Setting) -> dict[str, dict[str, float]]:
    torch.set_num_threads(setting.threads)
    rows = histories()
    indices = np.random.default_rng(1).permutation(len(rows))[: setting.batch * (setting.steps + 1)]
    theirs = plain_rows(rows, indices)
    sides = {
        "hugging face": lambda: train_theirs(fresh(rows, setting.dropout), theirs, batch=setting.batch, precision=setting.precision),
        "ours": lambda: train_ours(fresh(rows, setting.dropout), rows, indices, setting),
    }
    measured = take_turns(sides, setting.repeats)
    layouts = [rows.batch(part).layout for part in np.split(indices, setting.steps + 1)[1:]]
    floors = [floor(fresh(rows, 0.0).shape, layout, setting) for layout in layouts]
    measured["floor"] = {key: statistics.mean(each[key] for each in floors) for key in floors[0]}
    return measured


def on_gpu(setting: Setting, only: str = "") -> dict[str, dict[str, float]]:
    """Hugging Face plain and compiled; ours plain, compiled, with CUDA graphs, and as one graph; padded and in steps."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64  # every way has a model of its own, and all share their code
    rows = histories()
    indices = np.random.default_rng(1).permutation(len(rows))[: setting.batch * (setting.steps + 1)]
    theirs = plain_rows(rows, indices)
    steps = stairs(rows.lengths, setting.batch)
    layouts = {
        "padded": ((setting.batch, int(rows.lengths.max())),),
        "steps": steps,
        "steps of 8": tuple((count, -(-length // 8) * 8) for count, length in steps),  # as attention kernels like them
    }

    def hugging_face(**how: Any) -> Curve:
        model = fresh(rows, setting.dropout)
        return train_theirs(model, theirs, batch=setting.batch, precision=setting.precision, device=setting.device, **how)

    def plain(layout: Layout) -> Curve:
        return train_ours(fresh(rows, setting.dropout, setting.device), rows, indices, setting, layout=layout)

    makers: dict[str, Callable[[], Callable[[], Curve]]] = {
        "hugging face": lambda: hugging_face,
        "hugging face, eager attention": lambda: lambda: hugging_face(attention="eager"),
        "hugging face, compiled": lambda: lambda: hugging_face(compiled=True),
    }
    for name, layout in layouts.items():
        makers |= {
            f"ours, {name}": lambda layout=layout: lambda: plain(layout),
            f"ours, {name}, compiled": lambda layout=layout: compiled(rows, indices, setting, layout, "default"),
            f"ours, {name}, compiled with graphs": lambda layout=layout: compiled(rows, indices, setting, layout, "reduce-overhead"),
            f"ours, {name}, one graph": lambda layout=layout: captured(rows, indices, setting, layout, False),
            f"ours, {name}, compiled, one graph": lambda layout=layout: captured(rows, indices, setting, layout, True),
        }
    working = {}
    for name, make in makers.items():
        if name != "hugging face" and only not in name:
            continue
        start = time.perf_counter()
        try:
            side = make()
            curve = side()
        except Exception as error:  # one way that does not work must not hide the others
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        working[name] = side
        losses = f"loss {curve.losses[0]:.4f} ... {curve.losses[-1]:.4f}"
        print(
            f"{name}: {statistics.mean(curve.seconds) * 1e3:.2f} ms a step, {losses}, ready in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return take_turns(working, setting.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, help="of a repeat, without its first (2 on CPU, 50 on a GPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="on a GPU: of our ways only those with this in their name")
    given = parser.parse_args()
    setting = Setting(
        given.device,
        given.precision,
        steps=given.steps or (2 if given.device == "cpu" else 50),
        repeats=given.repeats,
        threads=given.threads,
    )
    measured = on_cpu(setting) if given.device == "cpu" else on_gpu(setting, given.only)
    machine = (
        torch.cuda.get_device_name()
        if given.device == "cuda"
        else f"{setting.threads} threads, {platform.processor() or platform.machine()}"
    )
    print(f"{machine}; torch {torch.__version__}; batch {setting.batch}, {setting.precision}")
    peer = measured["hugging face"]
    for name, value in measured.items():
        print(
            f"{name:45} {value['wall'] * 1e3:9.2f} ms wall {value['cpu'] * 1e3:9.2f} ms cpu {setting.batch / value['wall']:9.0f} samples/s"
            f"   {peer['wall'] / value['wall']:6.2f} x by wall {peer['cpu'] / value['cpu']:6.2f} x by cpu"
        )
    print(json.dumps({"machine": machine, "torch": torch.__version__, **setting.__dict__, "seconds": measured}))


if __name__ == "__main__":
    main()
