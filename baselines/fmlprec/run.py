"""Train FMLP-Rec on one domain and rank the whole catalogue for every user.

In: a job. Out: predictions.npz, valid_predictions.npz, meta.json, and progress.jsonl while it trains. Killed and started
again, it goes on from its last checkpoint and ends with the same weights.

Read this file if you write a baseline: everything a trained method does under the contract stands here once.
Shape legend: R training rows, U users, B batch, L history length, I items, K list length.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from model import FMLPRec, Shape
from torch.nn import functional as F

from harness.contract import HISTORY, ContractError, Domain, Job, Meta, Progress, Ragged, Stopping, main, ndcg_at_10, write_predictions


@dataclass(frozen=True)
class Settings:
    """The keys of a ``[configs.NAME]`` table."""

    width: int = 64
    """Embedding width."""
    blocks: int = 2
    """Pairs of filter and feed-forward layer."""
    dropout: float = 0.5
    loss: str = "ce"
    """``ce``: softmax over the catalogue. ``bpr``: against one sampled item, as in the paper."""
    learning_rate: float = 1e-3
    batch: int = 512
    """Training rows in a step."""
    epochs: int = 200
    """At most; the rule of the contract usually stops earlier."""
    eval_every: int = 1
    """Epochs between two validations."""

    @classmethod
    def of(cls, job: Job) -> Settings:
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(job.configuration) - set(known)):
            raise ContractError(f"configuration keys {unknown} are unknown; known are {known}")
        settings = cls(**job.configuration)
        if settings.loss not in ("ce", "bpr"):
            raise ContractError(f"loss = {settings.loss!r}: use 'ce' or 'bpr'")
        return settings


def fit(job: Job) -> None:
    torch.set_num_threads(job.budget.threads)
    torch.manual_seed(job.seed)
    torch.set_autocast_dtype(job.device, torch.bfloat16)
    settings, domain = Settings.of(job), job.domain
    shape = Shape(domain.n_items, HISTORY, settings.width, settings.blocks, settings.dropout)
    training = Training(job, settings, domain, FMLPRec(shape).to(job.device))
    meta = training.run()

    start = time.monotonic()
    items_UK = training.lists(domain.test_inputs(), job.k)
    meta.timings["predict"] = time.monotonic() - start
    write_predictions(job, items_UK)
    write_predictions(job, training.lists(domain.valid_inputs(), job.k), valid=True)
    meta.write(job)


class Training:
    """The training loop and everything that decides how it goes on (its checkpoint)."""

    def __init__(self, job: Job, settings: Settings, domain: Domain, model: FMLPRec):
        self.job, self.settings, self.domain, self.model = job, settings, domain, model
        inputs, targets = domain.training_rows()
        self.history_RL, self.target_R = ids(inputs), torch.from_numpy(targets.astype(np.int64))
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        self.order = torch.Generator().manual_seed(job.seed)  # the order of rows and the sampled items, apart from dropout
        self.epoch, self.steps, self.spent = 0, 0, 0.0
        self.best: dict[str, torch.Tensor] | None = None
        self._save_after = 0.0

    def run(self) -> Meta:
        """Train until patience, budget or the number of epochs ends it; leaves the best weights in the model."""
        settings, checkpoint = self.settings, self.job.checkpoint / "last.pt"
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
        # What an interrupted start has used counts: the budget is the run's, not the process's.
        job = dataclasses.replace(self.job, started=self.job.started - saved["used"]) if saved else self.job
        stopping, progress = Stopping(job), Progress(job)
        if saved:
            self.restore(saved, stopping)
        valid_inputs = self.domain.valid_inputs()
        valid_NL = ids(valid_inputs.filled())

        while self.epoch < settings.epochs and not (self.epoch and stopping.stop):  # one step at least, however small the budget
            start = time.monotonic()
            metrics = {"loss": self.train_epoch(job)}
            self.epoch += 1
            last = self.epoch == settings.epochs or job.remaining <= 0
            if last or self.epoch % settings.eval_every == 0:
                metrics["valid_ndcg_at_10"] = ndcg_at_10(self.lists(valid_inputs, 10, valid_NL), self.domain.valid)
                if stopping.improved(metrics["valid_ndcg_at_10"]):
                    self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            progress.log(self.epoch, of=settings.epochs, **metrics)
            self.spent += time.monotonic() - start
            self.save(job, stopping)

        if self.best is not None:
            self.model.load_state_dict(self.best)
        return Meta(
            timings={"fit": self.spent},
            parameters=sum(p.numel() for p in self.model.parameters()),
            steps=self.steps,
            epochs=self.epoch,
            peak_device_bytes=torch.cuda.max_memory_allocated() if job.device == "cuda" else None,
            precision=job.precision,
            **stopping.meta,
        )

    def lists(self, inputs: Ragged, k: int, filled_NL: torch.Tensor | None = None) -> np.ndarray:
        """The K best items of every input. A filter needs something to filter; ``filled_NL``: ``ids`` of the inputs with an item."""
        filled_NL = ids(inputs.filled()) if filled_NL is None else filled_NL
        return self.domain.lists(inputs, k, lambda: rank(self.model, filled_NL, k))

    def train_epoch(self, job: Job) -> float:
        """One pass over the rows, cut short when the budget is spent. Returns the mean loss of its steps."""
        self.model.train()
        losses = []
        for rows_B in torch.randperm(len(self.target_R), generator=self.order).split(self.settings.batch):
            loss = self.loss(self.history_RL[rows_B].to(job.device), self.target_R[rows_B].to(job.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            losses.append(loss.item())
            if job.remaining <= 0:
                break
        return float(np.mean(losses))

    def loss(self, history_BL: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.job.device, enabled=self.job.precision == "bf16"):
            user_BD = self.model(history_BL)
            if self.settings.loss == "ce":
                return F.cross_entropy(self.model.scores(user_BD), target_B)
            # The paper's pairwise loss, against any other item; the draw skips the target by counting past it.
            other_B = torch.randint(self.domain.n_items - 1, target_B.shape, generator=self.order).to(target_B.device)
            other_B += other_B >= target_B
            difference_BD = self.model.items(target_B + 1) - self.model.items(other_B + 1)
            return F.softplus(-(user_BD * difference_BD).sum(1)).mean()

    def save(self, job: Job, stopping: Stopping) -> None:
        """Write the checkpoint, whole or not at all, and never so often that it costs more than a tenth of the time."""
        start = time.monotonic()
        if start < self._save_after:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "order": self.order.get_state(),
            "dropout": torch.get_rng_state(),
            "dropout_cuda": torch.cuda.get_rng_state() if job.device == "cuda" else None,
            "counters": [self.epoch, self.steps, self.spent],
            "stopping": [stopping.best, stopping.evaluations, stopping.best_evaluation],
            "used": job.budget.seconds - job.remaining,
        }
        temporary = job.checkpoint / "last.tmp"
        torch.save(state, temporary)
        os.replace(temporary, job.checkpoint / "last.pt")
        self._save_after = time.monotonic() + 10 * (time.monotonic() - start)

    def restore(self, saved: dict[str, Any], stopping: Stopping) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        self.order.set_state(saved["order"])
        torch.set_rng_state(saved["dropout"])
        if saved["dropout_cuda"] is not None:
            torch.cuda.set_rng_state(saved["dropout_cuda"])
        self.epoch, self.steps, self.spent = saved["counters"]
        stopping.best, stopping.evaluations, stopping.best_evaluation = saved["stopping"]


def ids(inputs: Ragged) -> torch.Tensor:
    """Histories as the model wants them [lists, L]: item number + 1, filled up with 0 at the left."""
    return torch.from_numpy(inputs.padded(HISTORY, left=True).astype(np.int64) + 1)


@torch.no_grad()
def rank(model: FMLPRec, history_UL: torch.Tensor, k: int) -> np.ndarray:
    """The K best items [U, K] by full ranking. The history is not left out: in this protocol users may buy again."""
    model.eval()
    device = model.positions.device
    size = max(32, min(2048, 2**25 // model.items.num_embeddings))  # a batch of scores has at most 128 MiB
    lists = [top_k(model.scores(model(part_BL.to(device))).float(), k).cpu() for part_BL in history_UL.split(size)]
    return torch.cat(lists).numpy()


def top_k(scores_BI: torch.Tensor, k: int) -> torch.Tensor:
    """Best first, equal scores by the smaller number; -1 where the catalogue is smaller than K."""
    kept = min(k, scores_BI.size(1))
    values_BK, items_BK = scores_BI.topk(kept, dim=1)
    items_BK, order = items_BK.sort(dim=1)
    values_BK, order = values_BK.gather(1, order).sort(dim=1, descending=True, stable=True)
    items_BK = items_BK.gather(1, order)
    # Equal scores at the end of the list: which of them topk took is arbitrary, so these rows are sorted in full.
    tied_B = (scores_BI >= values_BK[:, -1:]).sum(1) > kept
    if tied_B.any():
        items_BK[tied_B] = scores_BI[tied_B].sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return F.pad(items_BK, (0, k - kept), value=-1)


if __name__ == "__main__":
    main(fit)
