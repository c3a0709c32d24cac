"""Train a T5 on the training rows of one or several domains, until the contract's rule, the budget or the epochs end it.

In: a job, settings, domains with ids, a model. Out: the best weights in the model, and a Meta of how it went.

Killed at any step and started again, it goes on from its checkpoint and ends with the same weights (on CPU: bit for bit): row
order and dropout follow from the step, the rest is in the checkpoint. Many processes train what one would (processes.py).

Legend: B rows of a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from harness.contract import ContractError, Job, Meta, Progress, Ragged, Stopping, ndcg_at_10
from utgrec.recommender.checkpoint import Checkpoint
from utgrec.recommender.corpora import Corpus, Mixture
from utgrec.recommender.decode import Lists, recommend
from utgrec.recommender.model import T5
from utgrec.recommender.processes import Processes
from utgrec.recommender.settings import Settings
from utgrec.recommender.trie import Trie

LOG_STEPS = 100
"""Inside a long epoch the curve gets a point after so many steps, or after a tenth of the epoch if that is more."""


class Training:
    """The loop, and everything that decides how it goes on (its checkpoint)."""

    def __init__(self, job: Job, settings: Settings, corpora: Sequence[Corpus], model: T5, processes: Processes):
        self.job, self.settings, self.corpora, self.model, self.processes = job, settings, corpora, model, processes
        self.mixture = Mixture(
            corpora, user_tokens=settings.user_tokens, temperature=settings.temperature, batch=settings.batch, seed=job.seed
        )
        self.tries = [Trie.of(corpus.ids, processes.device) for corpus in corpora]
        self.total = settings.epochs * self.mixture.steps_per_epoch
        cuda = processes.device.type == "cuda"
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and cuda)
        self.forward = torch.compile(model, dynamic=False) if self.compiled else model
        part = -(-settings.batch // (processes.world * settings.accumulate))  # rows that go through the model together, at most
        self.layout = self.mixture.layout(part) if self.compiled or cuda else None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=settings.weight_decay, fused=True)
        self.step, self.validated, self.spent = 0, 0, 0.0
        self.best: dict[str, torch.Tensor] | None = None
        self.loss, self.loss_steps = torch.zeros((), device=processes.device), 0  # summed since the last point of the curve
        self.stopping = Stopping(job)
        self.checkpoint = Checkpoint(job.checkpoint, self.identity())
        self.same_everywhere(self.checkpoint.identity)
        self.resume()
        self.progress = Progress(job) if processes.first else None

    def run(self) -> Meta:
        """Train to the end; leaves the best weights in the model."""
        epoch, before, started = self.mixture.steps_per_epoch, self.spent, time.monotonic()
        # One step at least, however small the budget.
        while self.step == 0 or not (self.step == self.total or self.processes.agree(self.stopping.stop)):
            self.train_step()
            if self.step % (epoch * self.settings.eval_every) == 0:
                self.validate()
            elif self.step % epoch == 0 or self.step % epoch % max(LOG_STEPS, epoch // 10) == 0:
                self.log()
            self.spent = before + time.monotonic() - started
            if self.processes.first and self.checkpoint.due:
                self.checkpoint.save(self.state())
        if self.validated < self.step:  # the budget cut an epoch short, or the epochs are no multiple of eval_every
            self.validate()
        self.spent = before + time.monotonic() - started
        if self.best is not None:
            self.model.load_state_dict(self.best)
        self.model.eval()
        return Meta(
            timings={"fit": self.spent},
            parameters=sum(p.numel() for p in self.model.parameters()),
            steps=self.step,
            epochs=-(-self.step // epoch),
            precision=self.job.precision,
            attention="sdpa" if self.layout else "written out",  # model.py, fused.py
            **self.stopping.meta,
        )

    # ---------------------------------------------------------------------------------------------------- one step

    def train_step(self) -> None:
        """One step on this process's share of the batch. The gradient is the mean over the rows of the whole batch."""
        rows_B = self.mixture.rows(self.step)
        mine = self.processes.share(rows_B)
        torch.manual_seed(self.dropout_seed())
        self.model.train()
        loss = torch.zeros((), device=self.processes.device)
        for part in np.array_split(mine, self.settings.accumulate):
            if len(part):
                part_loss = self.part_loss(part) * (len(part) / len(rows_B))
                part_loss.backward()
                loss += part_loss.detach()
        self.loss += self.processes.sum_gradients(self.model.parameters(), loss)
        self.loss_steps += 1
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.param_groups[0]["lr"] = self.settings.rate(self.step, self.mixture.steps_per_epoch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def part_loss(self, rows: np.ndarray) -> torch.Tensor:
        """Mean cross-entropy over the codes of these rows."""
        batch = self.mixture.tokens(rows)
        if self.layout:  # few shapes to compile, few kernels to launch; on a CPU rows as long as they are
            batch = batch.into(self.layout)
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.job.precision == "bf16"):
            return self.forward(*batch.to(self.processes.device))

    def dropout_seed(self) -> int:
        """Each step has its own, so that no generator's state need be kept; processes drop out different numbers."""
        entropy = np.random.SeedSequence([self.job.seed, 2, self.step, self.processes.rank])
        return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))

    # ------------------------------------------------------------------------------------------- validation, curves

    def validate(self) -> None:
        """NDCG@10 of the next item over the validation users: the mean over the domains. Keeps the weights if it is the best."""
        values = []
        for corpus, trie in zip(self.corpora, self.tries, strict=True):
            domain, beams = corpus.domain, self.settings.valid_beams
            rows = self.processes.share(validation_rows(corpus, self.settings, self.job.seed))
            lists = self.decode(corpus, trie, domain.valid_inputs(), domain.valid_users, rows, k=10, beams=beams)
            value = ndcg_at_10(lists.items_UK, domain.valid[rows])
            total, count = self.processes.sum(value * len(rows), len(rows))
            values.append(total / count)
        self.validated = self.step
        mean = float(np.mean(values))
        each = {f"valid_ndcg_at_10_{c.domain.name}": v for c, v in zip(self.corpora, values, strict=True)} if len(values) > 1 else {}
        if self.stopping.improved(mean):
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.log(valid_ndcg_at_10=mean, **each)

    def decode(self, corpus: Corpus, trie: Trie, inputs: Ragged, users: np.ndarray, rows: np.ndarray, *, k: int, beams: int) -> Lists:
        """The lists for these rows of ``inputs``, which are of ``users``."""
        histories = corpus.histories(inputs, users, rows, self.settings.user_tokens)
        how = {"constrained": self.settings.constrained, "precision": self.job.precision}
        return recommend(self.model, trie, histories, k=k, beams=beams, **how)

    def log(self, **metrics: float) -> None:
        """A point of the curve: mean loss since the last one, learning rate, and what validation says."""
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if self.loss_steps:
            metrics["loss"] = loss = float(self.loss) / self.loss_steps
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.step}: training has diverged; lower learning_rate "
                    f"({self.settings.learning_rate}) or raise warmup_steps ({self.settings.warmup_steps})"
                )
            self.loss, self.loss_steps = torch.zeros_like(self.loss), 0
        if self.progress:
            self.progress.log(self.step, of=self.total, epoch=self.step / self.mixture.steps_per_epoch, **metrics)

    # --------------------------------------------------------------------------------------------------- checkpoint

    def identity(self) -> dict[str, Any]:
        """What makes this training this training: a checkpoint of another one is refused."""
        return {
            **dataclasses.asdict(self.settings),
            "domains": ", ".join(f"{corpus.domain.name} {corpus.domain.info['digest']}" for corpus in self.corpora),
            "semantic ids": ", ".join(corpus.ids.digest for corpus in self.corpora),
            "first weights": digest(self.model),
            "seed": self.job.seed,
            "precision": self.job.precision,
            "device": self.processes.device.type,
            "processes": self.processes.world,
        }

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "loss": [self.loss, self.loss_steps],
            "counters": [self.step, self.validated, self.spent],
            "stopping": [self.stopping.best, self.stopping.evaluations, self.stopping.best_evaluation],
            "used": self.job.budget.seconds - self.job.remaining,
        }

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of this training."""
        saved = self.checkpoint.load()
        self.same_everywhere({"checkpoint": saved["counters"][0] if saved else None})
        if saved is None:
            return
        # What an interrupted start has used counts: the budget is the run's, not the process's.
        self.job = dataclasses.replace(self.job, started=self.job.started - saved["used"])
        self.stopping = Stopping(self.job)
        self.stopping.best, self.stopping.evaluations, self.stopping.best_evaluation = saved["stopping"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        device = self.processes.device
        self.best = {name: value.to(device) for name, value in saved["best"].items()} if saved["best"] else None
        self.step, self.validated, self.spent = saved["counters"]
        self.loss, self.loss_steps = saved["loss"][0].to(device), saved["loss"][1]

    def same_everywhere(self, mine: dict[str, Any]) -> None:
        """All processes must train the same thing; a difference would go unseen."""
        for rank, theirs in enumerate(self.processes.gather(mine)):
            for key, value in mine.items():
                if theirs[key] != value:
                    raise ContractError(
                        f"process {self.processes.rank} has {key} {value!r}, process {rank} has {theirs[key]!r}; start all of them with "
                        "the same job, on a file system that they share"
                    )


def validation_rows(corpus: Corpus, settings: Settings, seed: int) -> np.ndarray:
    """Of all users that are validated, or of as many as the settings say, drawn once."""
    rows = len(corpus.domain.valid)
    if not 0 < settings.valid_users < rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng([seed, 3]).choice(rows, settings.valid_users, replace=False))


def digest(model: T5) -> str:
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return weights.hexdigest()[:16]
