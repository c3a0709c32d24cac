"""Train the universal tokenizer: on several domains (pre-training), or on the target (adaptation). UTGRec section 3.5.

In: a job, settings, a catalogue of items, a model. Out: the trained model, and a Meta of how it went. The last weights are kept: there
is no validation value for a tokenizer, and neither a lower error nor fewer collisions mean better recommendations.

A step takes ``tokenizer_batch`` items over all processes, each with one item that occurs next to it. Where a process's share does not fit
through the model at once it goes in parts, and the gradient is still that of the whole batch: what terms are averaged over is counted
first; InfoNCE needs the vectors of all items, so a first pass without gradients computes them, InfoNCE gives the gradient at each
vector, and the second pass hands it on (Gao et al., arXiv 2101.06983). Both passes of a part draw the same dropout.

Killed at any step and started again, it goes on from its checkpoint and ends with the same weights (on CPU: bit for bit). Many
processes train what one would, but for what is drawn inside the model (dropout, noise).
"""

from __future__ import annotations

import dataclasses
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from harness.contract import Job, Meta, Progress
from utgrec.recommender.checkpoint import Checkpoint
from utgrec.recommender.processes import Processes
from utgrec.semantic_ids import usage
from utgrec.tokenizer.contrast import info_nce
from utgrec.tokenizer.data import Catalogue, Share
from utgrec.tokenizer.encode import encode_rows
from utgrec.tokenizer.model import TERMS, Micro, Terms, UniversalTokenizer
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.sharding import Optimizing, make_optimizing

Phase = Literal["pretrain", "adapt"]
START_ITEMS = 16
"""Items that codebooks start from, for each of their codes."""
POINTS = 100
"""Points of the live curve over the whole training, at most."""


@dataclass(frozen=True)
class Schedule:
    """What differs between the phases."""

    epochs: int
    learning_rate: float
    quantise_after: int
    """Steps before the codebooks enter."""

    @classmethod
    def of(cls, settings: Settings, phase: Phase, fresh: bool) -> Schedule:
        """``fresh``: nothing was pre-trained, so that the codebooks of adaptation, too, wait for vectors worth coding."""
        if phase == "pretrain":
            return cls(settings.tokenizer_epochs, settings.tokenizer_learning_rate, settings.quantise_after)
        return cls(settings.adapt_epochs, settings.adapt_learning_rate, settings.quantise_after if fresh else 0)


class Batches:
    """What goes through the model in a step; with ``workers``, threads make it while the step before is computed.

    Decoding and resizing leave Python to the others. All that is drawn follows from (seed, step), so that threads change nothing.
    """

    def __init__(self, catalogue: Catalogue, settings: Settings, processes: Processes, parts: int, total: int):
        """``parts`` of each process in each of the ``total`` steps."""
        self.catalogue, self.settings, self.processes, self.parts, self.total = catalogue, settings, processes, parts, total
        self._threads = ThreadPoolExecutor(settings.workers, "batches") if settings.workers else None
        self._next: tuple[int, Future[tuple[int, Share, list[Future[Micro]]]]] | None = None
        if settings.workers and settings.text_decoder:
            _ = catalogue.text_tokens  # before there are threads

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def take(self, step: int) -> tuple[int, Share, list[Micro]]:
        """How many items the step has over all processes, this process's share, and its parts. Raises what a thread has raised."""
        if self._threads is None:
            items, share, places = self._plan(step)
            return items, share, [self.catalogue.micro(share, part) for part in places]
        if self._next is None or self._next[0] != step:
            self._next = (step, self._threads.submit(self._begin, step))
        items, share, micros = self._next[1].result()
        made = [micro.result() for micro in micros]
        self._next = (step + 1, self._threads.submit(self._begin, step + 1)) if step + 1 < self.total else None
        return items, share, made

    def _plan(self, step: int) -> tuple[int, Share, list[np.ndarray]]:
        items = self.catalogue.step(step, self.settings.tokenizer_batch, self.processes.world * self.parts)
        share = self.catalogue.share(items, step, self.processes.share(np.arange(len(items))))
        return len(items), share, self.catalogue.parts(share, self.parts)

    def _begin(self, step: int) -> tuple[int, Share, list[Future[Micro]]]:
        assert self._threads is not None
        items, share, places = self._plan(step)
        return items, share, [self._threads.submit(self.catalogue.micro, share, part) for part in places]


class Training:
    """The loop, and everything that decides how it goes on (its checkpoint)."""

    def __init__(
        self,
        job: Job,
        settings: Settings,
        catalogue: Catalogue,
        model: UniversalTokenizer,
        processes: Processes,
        *,
        phase: Phase,
        fresh: bool = True,
        seconds: float | None = None,
    ):
        self.job, self.settings, self.catalogue, self.model, self.processes = job, settings, catalogue, model, processes
        self.fresh = fresh
        self.schedule = Schedule.of(settings, phase, fresh)
        if phase == "adapt" and not fresh:
            model.freeze_for_adaptation()
        self.per_epoch = catalogue.steps_per_epoch(settings.tokenizer_batch)
        self.total = self.schedule.epochs * self.per_epoch
        self.quantise_after = min(self.schedule.quantise_after, self.total // 2)  # however short the training
        self.seconds = job.budget.seconds if seconds is None else seconds
        self.optimizing: Optimizing = make_optimizing(model, settings, processes, self.parts_of_a_step, job.precision)
        self.step, self.spent = 0, 0.0
        self.sums: dict[str, float] = {}  # of the curve's next point
        self.codes: list[Tensor] = []
        self.checkpoint = Checkpoint(job.checkpoint, self.identity(phase))
        self.resume()
        self.batches = Batches(catalogue, settings, processes, self.parts_of_a_step, self.total)
        self.progress = Progress(job) if processes.first else None

    @property
    def parts_of_a_step(self) -> int:
        """Parts that every process cuts its share into, at most."""
        share = -(-min(self.settings.tokenizer_batch, len(self.catalogue.train_X)) // self.processes.world)
        return -(-share // self.settings.tokenizer_micro)

    def run(self) -> Meta:
        before, started = self.spent, time.monotonic()
        self.model.train()
        # One step at least, however small the budget.
        with self.batches:
            while self.step == 0 or not (self.step == self.total or self.processes.agree(self.spent >= self.seconds)):
                self.train_step()
                if self.step == self.total or self.step % max(1, self.total // POINTS) == 0:
                    self.log()
                self.spent = before + time.monotonic() - started
                if self.checkpoint_due:
                    self.optimizing.save(self.checkpoint, self.state())
        if self.fresh and self.step <= self.quantise_after:  # the budget ended it before the codebooks were needed
            self.start_books()
        self.optimizing.release()
        self.model.eval()
        stopped = "epochs" if self.step == self.total else "budget"
        return Meta(
            timings={"fit": self.spent},
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            steps=self.step,
            epochs=-(-self.step // self.per_epoch),
            stopped_by=stopped,
            budget_bound=stopped == "budget",
            precision=self.job.precision,
        )

    @property
    def checkpoint_due(self) -> bool:
        return self.processes.agree(self.checkpoint.due) if self.optimizing.collective else self.processes.first and self.checkpoint.due

    # ---------------------------------------------------------------------------------------------------- one step

    def train_step(self) -> None:
        items, share, micros = self.batches.take(self.step)
        counts = dict(zip(share.counts, self.processes.sum(*share.counts.values()), strict=True))  # of all processes
        quantise = self.step >= self.quantise_after
        if self.fresh and self.step == self.quantise_after:
            self.start_books()
        aligned = self.settings.align_weight > 0
        gradients = self.align(micros, items) if aligned and self.parts_of_a_step > 1 else None
        for number, micro in enumerate(micros):
            terms = self.forward(number, micro, quantise=quantise)
            loss = self.weighted(terms, counts)
            self.add(loss=loss, **self.told(terms, counts))
            if gradients is not None:
                loss = loss + (terms.h_BLD * gradients[number]).sum()
            elif aligned:
                align = self.align_loss([terms.h_BLD], micros, items)
                self.add(align=align, loss=self.settings.align_weight * align)
                loss = loss + self.settings.align_weight * align
            self.optimizing.backward(loss, last=number == len(micros) - 1)
            if terms.codes_BL is not None:
                self.codes = [*self.codes[-63:], terms.codes_BL]
        self.optimizing.step(self.rate(self.step), self.settings.tokenizer_clip)
        self.add(steps=1)
        self.step += 1

    def start_books(self) -> None:
        with self.optimizing.changing(self.model.quantizer):
            self.model.quantizer.start(self.residuals_of_sample(), self.job.seed)

    def residuals_of_sample(self) -> Tensor:
        """t [X, L, D] of some items, without dropout: what codebooks start from. The same in all processes."""
        count = START_ITEMS * max(self.settings.widths)
        rows_X = np.random.default_rng([self.job.seed, 14]).permutation(self.catalogue.train_X)[:count]
        if self.optimizing.collective:  # all processes make as many calls of the model
            rows_X = rows_X[: max(1, len(rows_X) // self.processes.world) * self.processes.world]
        mine_XLD = encode_rows(self.model, self.catalogue, self.processes.share(rows_X), self.processes.device, self.job.precision)[1]
        self.model.train()
        return torch.from_numpy(self.processes.gather_rows(mine_XLD, len(rows_X))).to(self.processes.device)

    def forward(self, number: int, micro: Micro, **how: bool) -> Any:
        """``number``: of the part, which draws the same however often it goes through the model."""
        torch.manual_seed(self.drawn(number))
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.job.precision == "bf16"):
            return self.optimizing.model(micro.to(self.processes.device), **how)

    def weighted(self, terms: Terms, counts: dict[str, float]) -> Tensor:
        """The objective without alignment: each term as a mean over its items, tokens or pictures of the whole batch."""
        settings, mean = self.settings, {name: terms.sums[name] / max(1.0, counts.get(COUNTED[name], 0.0)) for name in TERMS}
        raw = mean["text"] + settings.picture_weight * (mean["noise"] + mean["bound"])
        again = mean["text_neighbour"] + settings.picture_weight * (mean["noise_neighbour"] + mean["bound_neighbour"])
        return raw + settings.cooccurrence_weight * again + settings.code_weight * mean["code"]

    def told(self, terms: Terms, counts: dict[str, float]) -> dict[str, Tensor]:
        """The terms for the curve, unweighted."""
        there = (name for name in TERMS if terms.sums[name].requires_grad)
        return {name: terms.sums[name] / max(1.0, counts.get(COUNTED[name], 0.0)) for name in there}

    def align(self, micros: list[Micro], items: int) -> list[Tensor]:
        """The gradient of the weighted InfoNCE at every vector of every part."""
        with torch.no_grad():
            vectors = [self.forward(number, micro, quantise=False, vectors_only=True) for number, micro in enumerate(micros)]
        vectors = [h_BLD.detach().requires_grad_() for h_BLD in vectors]
        loss = self.align_loss(vectors, micros, items)
        self.add(align=loss, loss=self.settings.align_weight * loss)
        return list(torch.autograd.grad(self.settings.align_weight * loss, vectors))

    def align_loss(self, vectors: list[Tensor], micros: list[Micro], items: int) -> Tensor:
        """This process's part of the mean over all items of the step."""
        pairs = [h_BLD.split([micro.n_items, len(h_BLD) - micro.n_items]) for h_BLD, micro in zip(vectors, micros, strict=True)]
        h_BLD, neighbour_BLD = (torch.cat(side) for side in zip(*pairs, strict=True))
        return info_nce(h_BLD, neighbour_BLD, self.settings.temperature_align) * (len(h_BLD) / items)

    def rate(self, step: int) -> float:
        """The learning rate: up for a share of the steps, then linearly down to 0 behind the last."""
        warm = math.ceil(self.settings.tokenizer_warmup * self.total)
        if step < warm:
            return self.schedule.learning_rate * (step + 1) / warm
        return self.schedule.learning_rate * (self.total - step) / max(1, self.total - warm)

    def drawn(self, part: int) -> int:
        entropy = np.random.SeedSequence([self.job.seed, 20, self.step, self.processes.rank, part])
        return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))

    # ------------------------------------------------------------------------------------------------------ the curve

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)

    def log(self) -> None:
        """Means over the steps since the last point; usage of the codes over the last items."""
        steps = self.sums.pop("steps", 0) or 1
        names = sorted(self.sums)
        totals = self.processes.sum(*(float(self.sums[name]) for name in names))
        means = {name: total / steps for name, total in zip(names, totals, strict=True)}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.step}: training has diverged; lower the learning rate "
                f"({self.schedule.learning_rate}) or raise tokenizer_warmup ({self.settings.tokenizer_warmup})"
            )
        health = usage(torch.cat(self.codes).cpu().numpy(), self.settings.widths) if self.codes else {}
        if self.progress:
            rate = self.rate(self.step - 1)
            self.progress.log(self.step, of=self.total, epoch=self.step / self.per_epoch, learning_rate=rate, **means, **health)
        self.sums, self.codes = {}, []

    # --------------------------------------------------------------------------------------------------- checkpoint

    def identity(self, phase: Phase) -> dict[str, Any]:
        """What makes this training this training: a checkpoint of another one is refused."""
        return {
            **{key: value for key, value in dataclasses.asdict(self.settings).items() if key != "workers"},  # which change nothing
            "phase": phase,
            "domains": ", ".join(f"{domain.name} {domain.info['digest']}" for domain in self.catalogue.domains),
            "first weights": self.optimizing.digest,
            "seed": self.job.seed,
            "precision": self.job.precision,
            "device": self.processes.device.type,
            "processes": self.processes.world,
        }

    def state(self) -> dict[str, Any]:
        return {"counters": [self.step, self.spent], "sums": {k: float(v) for k, v in self.sums.items()}, "codes": self.codes}

    def resume(self) -> None:
        saved = self.optimizing.load(self.checkpoint)
        if saved is not None:
            self.step, self.spent = saved["counters"]
            self.sums, self.codes = saved["sums"], [codes.to(self.processes.device) for codes in saved["codes"]]


COUNTED = {name: name.replace("bound", "noise") for name in TERMS}
"""Both parts of a picture's loss are means over the same pictures."""
