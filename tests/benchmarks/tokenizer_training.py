"""The training step of UTGRec's tokenizer, and encoding items to ids, beside the released formulation (peers/released_tokenizer.py).

    python tests/benchmarks/tokenizer_training.py                                   an eighth of the size, one CPU thread, fp32
    python tests/benchmarks/tokenizer_training.py --size 2b --device cuda           Qwen2-VL-2B's shapes, bf16
    python tests/benchmarks/tokenizer_training.py --plan                            counts products and bytes only

Same weights, same items, same masks, neighbours and noise; that losses and gradients agree is checked first, without dropout. A step is
``Training.train_step``: masks, collation, forward, backward, AdamW. Texts are cut into tokens and pictures decoded beforehand, for both
sides. Sides take turns, on the same batches; a figure is the median over rounds of seconds a step, and the spread is that of the rounds.
``cpu`` is the time of all threads. ``--out results/performance/utgrec.md`` rewrites the part of the file between its marks.

    ours             as it is: rows of like length together, states at the code tokens alone, losses of selected tokens alone, moments of
                     the VAE from their file
    ours, cached     and outputs of the vision tower from their file (cache_pictures = true)
    ... uncheckpointed   and without gradient checkpointing: for a GPU that has the memory
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.peers import released_tokenizer as peer  # noqa: E402
from tests.benchmarks.tokenizer_world import SIZES, Size, World, make_domain, vocabulary_of  # noqa: E402
from utgrec.tokenizer.data import Share  # noqa: E402
from utgrec.tokenizer.encode import encode_rows  # noqa: E402
from utgrec.tokenizer.encoder import groups_of_like_length  # noqa: E402
from utgrec.tokenizer.qwen import group_fee  # noqa: E402
from utgrec.tokenizer.train import Training  # noqa: E402
from utgrec.tokenizer.vision_cache import cache_bytes  # noqa: E402

TARGETS = {
    "cpu": {"step": 1.5, "encode": 2.0, "encode, cached": 3.0},
    "cuda": {"step": 1.8, "step, cached": 3.0, "memory": 2.0, "encode": 2.0, "encode, cached": 3.0},
}
"""Times faster than the peer, and times less memory."""
SIDES = {
    "released": {},
    "ours": {},
    "ours, cached": {"cached": True},
    "ours, uncheckpointed": {"checkpointing": False},
    "ours, cached, uncheckpointed": {"cached": True, "checkpointing": False},
}
MARKS = ("<!-- measured: {} -->", "<!-- end: {} -->")


@dataclass(frozen=True)
class Setting:
    size: str = "eighth"
    device: str = "cpu"
    precision: str = "fp32"
    rounds: int = 5
    threads: int = 1


# ------------------------------------------------------------------------------------------------------ what is timed


class Step:
    """The step of one side, again and again on the same batches."""

    def __init__(self, name: str, setting: Setting, folder: Path):
        how = dict(SIDES[name])
        cached = how.pop("cached", False)
        self.world = World(SIZES[setting.size], folder, device=setting.device, precision=setting.precision, **how)
        self.ours = self.world.ours(cached=cached)
        self.theirs = self.world.theirs(self.ours) if name == "released" else None
        if self.theirs:  # its weights are copies: only the catalogue of ours is used from here on
            self.ours.optimizing.model = self.ours.model = self.ours.optimizing.optimizer = None  # type: ignore[assignment]

    def __call__(self, step: int) -> None:
        if self.theirs:
            self.theirs.model.train()
            self.theirs.step(share_of(self.ours, step), self.ours.drawn(0), self.ours.rate(step))
        else:
            self.ours.model.train()
            self.ours.step = step
            self.ours.train_step()


class Encode:
    """All rows of the catalogue."""

    def __init__(self, step: Step, **how: Any):
        self.step, self.how = step, how
        self.rows_X = np.arange(step.world.size.encoded)

    def __call__(self, _: int) -> np.ndarray:
        step = self.step
        if step.theirs:
            return peer.encode(step.theirs.model, step.ours.catalogue, self.rows_X, step.world.precision, **self.how)
        return encode_rows(step.ours.model, step.ours.catalogue, self.rows_X, step.world.device, step.world.precision)[0]


def share_of(ours: Training, step: int) -> Share:
    """The batch of a step, its items in the order in which ours takes them: so that both draw the same for the same item."""
    items = ours.catalogue.step(step, ours.settings.tokenizer_batch, 1)
    share = ours.catalogue.share(items, step, np.arange(len(items)))
    (order,) = ours.catalogue.parts(share, 1)
    lists = {name: [getattr(share, name)[place] for place in order] for name in ("own", "neighbour")}
    arrays = ("items_B", "neighbours_B", "pictured", "pictured_neighbour", "places_B")
    return dataclasses.replace(share, **lists, **{name: getattr(share, name)[order] for name in arrays})


def take_turns(sides: dict[str, Callable[[int], Any]], setting: Setting, ready: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Seconds of every side, round by round; the first is for warming up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(setting.rounds + 1):
        for name, side in sides.items():
            ready()
            begin = time.perf_counter(), time.process_time()
            side(number)
            ready()
            taken[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {
        name: {"wall": [wall for wall, _ in pairs[1:]], "cpu": [cpu for _, cpu in pairs[1:]]} for name, pairs in taken.items()
    }  # fmt: skip


def waiter(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


# -------------------------------------------------------------------------------------------------- the same results


def agreement(setting: Setting, folder: Path) -> dict[str, float]:
    """Largest relative differences in two steps without dropout: of the loss, of a weight's gradient, of all gradients together; and
    the share of equal codes."""
    world = World(SIZES[setting.size], folder, device=setting.device, precision=setting.precision, lora_dropout=0.0, mlp_dropout=0.0)
    ours = world.ours()
    theirs = world.theirs(ours)
    moments = world.vae.moments
    world.vae.moments = lambda x: tuple(part.half().float() for part in moments(x))  # type: ignore[method-assign]  # as in our file
    ours.optimizing.step = lambda *_: None  # type: ignore[method-assign]
    ours.model.train()
    found = {"loss": 0.0, "gradient": 0.0, "gradients": 0.0}
    their_weights = dict(theirs.model.named_parameters())
    for step in range(2):
        ours.step, ours.sums = step, {}
        ours.train_step()
        loss = theirs.gradients(share_of(ours, step), ours_seed(ours, step))
        found["loss"] = max(found["loss"], abs(float(ours.sums["loss"] / loss) - 1))
        apart = length = 0.0
        for name, weight in ours.model.named_parameters():
            if weight.requires_grad:
                other = their_weights[peer.their_name(name)]
                assert weight.grad is not None and other.grad is not None, name
                difference, norm = float((weight.grad - other.grad).norm()), float(other.grad.norm())
                apart, length = apart + difference**2, length + norm**2
                found["gradient"] = max(found["gradient"], difference / max(norm, 1e-9))
                weight.grad = other.grad = None
        found["gradients"] = max(found["gradients"], (apart / length) ** 0.5)
    rows = np.arange(world.size.encoded)
    mine = encode_rows(ours.model, ours.catalogue, rows, world.device, world.precision)[0]
    found["equal codes"] = float((mine == peer.encode(theirs.model, ours.catalogue, rows, world.precision)).mean())
    return found


def ours_seed(ours: Training, step: int) -> int:
    ours.step = step
    return ours.drawn(0)


LIMITS = {"fp32": {"loss": 1e-5, "gradient": 1e-3}, "bf16": {"loss": 2e-2, "gradients": 0.2}}
"""Of every weight's gradient, or, where bf16 moves an item to another code, of all together."""
EQUAL_CODES = {"fp32": 1.0, "bf16": 0.9}


def check(found: dict[str, float], precision: str) -> None:
    wrong = [name for name, limit in LIMITS[precision].items() if not found[name] <= limit]
    if wrong or found["equal codes"] < EQUAL_CODES[precision]:
        raise AssertionError(f"the sides do not agree: {found}, limits {LIMITS[precision]}, equal codes {EQUAL_CODES[precision]}")


# ------------------------------------------------------------------------------------------------------------- memory


def peak(name: str, setting: Setting, folder: Path) -> float:
    """MB of a step at its peak: on a GPU all of it, else beyond what there was before the step, weights included."""
    step = Step(name, setting, folder)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(0)
        return torch.cuda.max_memory_allocated() / 2**20
    torch.randn(64, 64) @ torch.randn(64, 64)  # libraries
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    step(0)
    return resident("VmHWM") - before


def resident(mark: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) / 1024


def peak_apart(name: str, setting: Setting) -> float:
    command = [sys.executable, __file__, "--peak", name, "--size", setting.size, "--device", setting.device]
    command += ["--precision", setting.precision, "--threads", str(setting.threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


# ------------------------------------------------------------------------------------------- floors: products, and bytes


def counted(run: Callable[[], Any]) -> float:
    """FLOP of the products in a call, as torch counts them; it does not know these three."""
    aten = torch.ops.aten
    mapping = {
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


def ceiling(setting: Setting) -> float:
    """FLOP a second of a large product."""
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    n = 8192 if setting.device == "cuda" else 1536
    x, y, ready, best = *(torch.randn(n, n, device=setting.device, dtype=dtype) for _ in range(2)), waiter(setting.device), float("inf")
    for _ in range(6):
        ready()
        begin = time.perf_counter() if setting.device == "cuda" else time.process_time()
        x @ y
        ready()
        best = min(best, (time.perf_counter() if setting.device == "cuda" else time.process_time()) - begin)
    return 2.0 * n**3 / best


@dataclass(frozen=True)
class Lengths:
    """Of one step: tokens of prompts (items, neighbours), of texts, patches of pictures by prompt."""

    prompts: tuple[list[int], list[int]]
    texts: tuple[list[int], list[int]]
    selected: int
    patches: list[int]


def expected(size: Size, lengths: Lengths, name: str, *, device: str, lora: int = 8) -> dict[str, float]:
    """FLOP of a step by part; ``name`` of a side. Attention counts all pairs, as kernels without a causal mask compute them."""
    D, key_width, F, L = size.width, size.kv_heads * size.width // size.heads, size.ff, 3
    theirs, cached, again = name == "released", "cached" in name, "uncheckpointed" not in name
    own, neighbour = lengths.prompts

    def layer(inner: int) -> int:
        return D * (D + 2 * key_width) + D * D + 3 * D * inner

    if theirs:
        groups = [(len(side), max(side)) for side in lengths.prompts]
        texts = [(len(side), max(side)) for side in lengths.texts]
    else:
        cuts = groups_of_like_length(np.array(own + neighbour), group_fee(layer(F), device))[1]
        groups = [(end - first, length) for first, end, length in cuts]
        every = lengths.texts[0] + lengths.texts[1]
        texts = [(len(every), max(every))]

    low = lora * (2 * D + 2 * (D + key_width) + 2 * D + 3 * (D + F))  # q, k and v, o, the three of the MLP
    tokens = sum(rows * length for rows, length in groups)
    passes = 3 if again else 2  # forward, once more, and the gradient of the input; frozen weights have none
    pairs = 4 * D * sum(rows * length**2 for rows, length in groups)
    body = size.layers * (2 * tokens * (layer(F) * passes + low * (passes + 1)) + pairs * (passes - 1 + 2.5))
    E, pictures = size.tower_width, lengths.patches
    patches = sum(pictures)
    tower = 2 * patches * 3 * 2 * 14 * 14 * E + size.tower_layers * (24 * patches * E * E + 4 * E * sum(count**2 for count in pictures))
    tower += 2 * patches // 4 * (16 * E * E + 4 * E * D)
    text_rows = sum(rows * (length + L) for rows, length in texts)
    text_pairs = sum(rows * (length + L) ** 2 for rows, length in texts)
    latents = (size.vae[3] >> (len(size.vae[1]) - 1)) ** 2
    picture_rows, W = len(pictures) * (latents + L), size.diffusion_width
    decoders = 6 * layer(4 * D) * (text_rows + picture_rows) + 3.5 * 4 * D * (text_pairs + len(pictures) * (latents + L) ** 2)
    denoiser = 6 * len(pictures) * latents * (D * W + 4 * (48 * W + size.diffusion_depth * 5 * W * W + 2 * W * W))
    labelled = sum(rows * length for rows, length in texts) if theirs else lengths.selected
    parts = {
        "language model": body,
        "vision tower": 0.0 if cached else float(tower),
        "head over the prompts": 2.0 * size.vocabulary * D * tokens if theirs else 0.0,
        "logits of the text decoder": 6.0 * size.vocabulary * D * labelled,
        "decoders, diffusion": float(decoders + denoiser),
        "VAE": len(pictures) * vae_flop(size) if theirs else 0.0,
    }
    return parts | {"tokens": float(tokens)}


def total(parts: dict[str, float]) -> float:
    return sum(value for name, value in parts.items() if name != "tokens")


def vae_flop(size: Size) -> float:
    from tests.benchmarks.tokenizer_world import SmallVAE

    with torch.device("meta"):
        vae = SmallVAE(size.vae)
        side = size.vae[3]
        with FlopCounterMode(display=False) as counter:
            vae.moments(torch.empty(1, 3, side, side))
    return float(counter.get_total_flops())


def lengths_of(size: Size, folder: Path, steps: int = 8) -> list[Lengths]:
    """Of batches of the made-up items, without any model."""
    from utgrec.tokenizer.encoder import content_tokens
    from utgrec.tokenizer.pictures import read_picture

    domain = make_domain(size, folder / "lengths")
    texts = [len(one) for one in content_tokens(vocabulary_of(size, domain.texts), domain.texts, size.text_tokens)]
    grids = [read_picture(data, size.pixels_min, size.pixels_max) if (data := domain.pictures[i]) else None for i in range(size.items)]
    patches = [grid[1][1] * grid[1][2] if grid else 0 for grid in grids]
    rng = np.random.default_rng(5)
    found = []
    for _ in range(steps):
        sides = [rng.choice(size.items, size.batch, replace=False) for _ in range(2)]
        prompts = [[texts[i] + patches[i] // 4 + 10 for i in side] for side in sides]  # 10: what stands around both
        rows = [[texts[i] for i in side] for side in sides]
        seen = [patches[i] for side in sides for i in side if patches[i]]
        found.append(Lengths((prompts[0], prompts[1]), (rows[0], rows[1]), sum(min(n, 512) for side in rows for n in side), seen))
    return found


def plan(size_name: str, device: str) -> dict[str, Any]:
    """Products of a step by part, means over batches; and what the cache of the vision tower costs and saves."""
    size = SIZES[size_name]
    with tempfile.TemporaryDirectory() as folder:
        every = lengths_of(size, Path(folder))
    steps = {}
    for name in SIDES:
        each = [expected(size, one, name, device=device) for one in every]
        steps[name] = {part: statistics.mean(parts[part] for parts in each) for part in each[0]}
    pictures = [count for one in every for count in one.patches]
    tower = sum(expected(size, one, "ours", device=device)["vision tower"] for one in every) / len(pictures)
    tokens = statistics.mean(pictures) / 4
    real = statistics.mean(sum(one.prompts[0] + one.prompts[1]) for one in every)
    return {"steps": steps, "picture tokens": tokens, "tower": tower, "tokens": real, "bytes": tokens * size.width * 2}


# -------------------------------------------------------------------------------------------------------- all of it


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(setting.threads)
    if setting.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {"agreement": agreement(setting, folder)}
    check(found["agreement"], setting.precision)
    names = [name for name in SIDES if setting.device == "cuda" or name != "ours, cached, uncheckpointed"]
    steps: dict[str, Any] = {}
    for name in names:
        try:
            steps[name] = Step(name, setting, folder)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: {error}", file=sys.stderr)
    ready = waiter(setting.device)
    print("the clock runs", file=sys.stderr, flush=True)
    found["step"] = take_turns(steps, setting, ready)
    encoders: dict[str, Callable[[int], Any]] = {
        name: Encode(step) for name, step in steps.items() if "uncheckpointed" not in name
    }  # fmt: skip
    encoders["released, sorted by length"] = Encode(steps["released"], by_length=True)
    found["encode"] = take_turns(encoders, setting, ready)
    print("the clock stops", file=sys.stderr, flush=True)
    found["ceiling"] = ceiling(setting)
    found["flop"] = {name: counted(lambda step=step: step(1)) for name, step in steps.items()} if setting.device == "cpu" else {}
    return found


def memory(setting: Setting) -> dict[str, float]:
    """Each side in a process of its own. A side that does not fit is left out."""
    found = {}
    for name in SIDES:
        try:
            found[name] = peak_apart(name, setting)
        except subprocess.CalledProcessError as error:
            print(f"{name}: its memory could not be measured ({error})", file=sys.stderr)
    return found


# ------------------------------------------------------------------------------------------------------------ report


def ratios(times: dict[str, dict[str, list[float]]], name: str, clock: str) -> list[float]:
    """Times faster than the peer, round by round."""
    return [theirs / ours for theirs, ours in zip(times["released"][clock], times[name][clock], strict=True)]


def summary(setting: Setting, found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, target, measured), by processor time on a CPU and by the wall clock on a GPU."""
    clock = "cpu" if setting.device == "cpu" else "wall"
    rows = []
    for what, target in TARGETS[setting.device].items():
        if what == "memory":
            rows.append(("peak memory of a step", target, found["memory"]["released"] / found["memory"]["ours"]))
            continue
        kind, _, cached = what.partition(", ")
        name = "ours, cached" if cached else "ours"
        title = {"step": "training step", "encode": "encoding items"}[kind] + (", vision tower cached" if cached else "")
        rows.append((title, target, statistics.median(ratios(found[kind], name, clock))))
    return rows


def report(setting: Setting, found: dict[str, Any]) -> str:
    size = SIZES[setting.size]
    lines = ["| | target | measured | met |", "|---|---|---|---|"]
    for what, target, value in summary(setting, found):
        lines.append(f"| {what} | {target:.1f} x | {value:.2f} x | {'yes' if value >= target else '**no**'} |")
    for kind, per in (("step", f"training step, {size.batch} items"), ("encode", f"encoding {size.encoded} items")):
        lines += ["", f"Seconds: {per}. Median of {setting.rounds} rounds (least to most).", ""]
        lines += ["| | cpu | wall | items/s by cpu | times the peer by cpu | by wall |", "|---|---|---|---|---|---|"]
        count = size.batch if kind == "step" else size.encoded
        for name, times in found[kind].items():
            cpu, wall = (f"{statistics.median(times[c]):.3g} ({min(times[c]):.3g} to {max(times[c]):.3g})" for c in ("cpu", "wall"))
            faster = [ratios(found[kind], name, c) for c in ("cpu", "wall")]
            said = [f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in faster]
            lines.append(f"| {name} | {cpu} | {wall} | {count / statistics.median(times['cpu']):.1f} | {said[0]} | {said[1]} |")
    if found["flop"]:
        lines += ["", f"Floor: the largest product here runs at {found['ceiling'] / 1e9:.0f} GFLOP/s.", ""]
        lines += ["| step | GFLOP of products | floor, s | share of the floor |", "|---|---|---|---|"]
        for name, flop in found["flop"].items():
            floor = flop / found["ceiling"]
            share = floor / statistics.median(found["step"][name]["cpu"])
            lines.append(f"| {name} | {flop / 1e9:.0f} | {floor:.2f} | {share:.0%} |")
    if found.get("memory"):
        what = "all that is allocated" if setting.device == "cuda" else "beyond what there is before it"
        lines += ["", f"Peak memory of a step ({what}), a process each.", "", "| | MB | share of the peer |", "|---|---|---|"]
        lines += [f"| {name} | {mb:,.0f} | {mb / found['memory']['released']:.2f} |" for name, mb in found["memory"].items()]
    agreed = found["agreement"]
    lines += [
        "",
        f"Agreement, two steps without dropout: loss within {agreed['loss']:.1e}, gradient of every weight within {agreed['gradient']:.1e} "
        f"(relative), {agreed['equal codes']:.1%} of the codes equal.",
    ]
    return "\n".join(lines)


def report_plan(size_name: str, device: str) -> str:
    found, size = plan(size_name, device), SIZES[size_name]
    parts = [part for part in found["steps"]["ours"] if part != "tokens"]
    unit, scale = ("TFLOP", 1e12) if size_name == "2b" else ("GFLOP", 1e9)
    lines = [f"| {unit} of a step of {size.batch} items | " + " | ".join(SIDES) + " |", "|---|" + "---|" * len(SIDES)]
    for part in parts:
        lines.append(f"| {part} | " + " | ".join(f"{found['steps'][name][part] / scale:.1f}" for name in SIDES) + " |")
    lines.append("| **all** | " + " | ".join(f"**{total(found['steps'][name]) / scale:.1f}**" for name in SIDES) + " |")
    peers = total(found["steps"]["released"])
    lines.append("| times less than the peer | " + " | ".join(f"{peers / total(found['steps'][name]):.2f}" for name in SIDES) + " |")
    lines.append(
        f"| tokens in the language model ({found['tokens']:,.0f} are no padding) | "
        + " | ".join(f"{found['steps'][name]['tokens']:,.0f}" for name in SIDES)
        + " |"
    )
    body = size.layers * (size.width * (2 * size.width + 2 * size.kv_heads * size.width // size.heads) + 3 * size.width * size.ff)
    lines += ["", f"Head over the body, forward, a token: {size.vocabulary * size.width / body:.3f}."]
    return "\n".join(lines)


def report_cache(rates: Iterable[float] = (100e12, 400e12)) -> str:
    """The cache of the vision tower at the paper's scale: what it costs, and when it pays."""
    found, items = plan("2b", "cuda"), 344_000
    tokens, tower, size = found["picture tokens"], found["tower"], found["bytes"]
    lines = [
        f"A picture has {tokens:.0f} tokens on average (500 pixels the longer side): {tokens:.0f} x 1,536 numbers x 2 bytes = "
        f"{size / 1e6:.2f} MB; the tower takes {tower / 1e12:.2f} TFLOP for it, {tower / size / 1e6:.1f} MFLOP a byte.",
        f"{items:,} items: {cache_bytes(items, tokens) / 1e9:.0f} GB (all square, 324 tokens: {cache_bytes(items, 324) / 1e9:.0f} GB). An "
        "item is encoded twice an epoch, as itself and as a neighbour, and once for its id: 7 times in 3 epochs, 81 in 40 of adaptation.",
        "",
        "| tower at | a picture takes | reading pays from | saved in pre-training (6 of 7 times) |",
        "|---|---|---|---|",
    ]
    for rate in rates:
        seconds = tower / rate
        saved = 6 * items * seconds / 3600
        lines.append(f"| {rate / 1e12:.0f} TFLOP/s | {seconds * 1e3:.1f} ms | {size / seconds / 1e6:.0f} MB/s | {saved:.1f} GPU hours |")
    return "\n".join(lines)


def write(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks of that name."""
    begin, end = (mark.format(name) for mark in MARKS)
    old = path.read_text()
    before, rest = old.split(begin)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def machine() -> str:
    import transformers

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {gpu}, Linux {platform.release().split('-')[0]}; CPython "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="eighth")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="count only")
    parser.add_argument("--out", type=Path, help="results/performance/utgrec.md: rewrite what was measured")
    parser.add_argument("--peak", choices=SIDES, help="print the MB of one step and end")
    given = parser.parse_args()
    precision = given.precision or ("bf16" if given.device == "cuda" else "fp32")
    setting = Setting(given.size, given.device, precision, given.rounds, given.threads)
    with tempfile.TemporaryDirectory() as folder:
        if given.peak:
            torch.set_num_threads(setting.threads)
            print(peak(given.peak, setting, Path(folder)))
            return
        texts = {"cache": report_cache(), "products 2b": report_plan("2b", "cuda"), "products eighth": report_plan("eighth", "cpu")}
        if not given.plan:
            begin = machine()
            used = memory(setting)  # before anything lies on a GPU
            found = measure(setting, Path(folder)) | {"memory": used}
            command = f"python tests/benchmarks/tokenizer_training.py {' '.join(sys.argv[1:])}"
            texts[f"{setting.device} {setting.size}"] = f"{begin}.\n\n```\n{command}\n```\n\n{report(setting, found)}"
            print(json.dumps({"machine": begin, **vars(setting), **found}), file=sys.stderr)
    for name, text in texts.items():
        print(f"\n## {name}\n\n{text}")
        if given.out:
            write(given.out, name, text)


if __name__ == "__main__":
    main()
