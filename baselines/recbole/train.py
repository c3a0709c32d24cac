"""Training and ranking: RecBole trains an epoch, the contract's rule decides when to stop.

In: a RecBole trainer and its batches. Out: the weights with the best validation NDCG@10, ranked lists of item numbers.
An interrupted run goes on from its last checkpoint and ends with the same weights.

Shape legend: B batch, U users, I items, K list length.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer

from harness.contract import Job, Progress, Stopping


@dataclass
class Fitted:
    """How training went; ``spent`` is its seconds over all starts."""

    stopping: Stopping
    epochs: int = 0
    steps: int = 0
    spent: float = 0.0


def fit_epochs(
    job: Job, trainer: Trainer, loader: TrainDataLoader, epochs: int, eval_every: int, validate: Callable[[], float] | None
) -> Fitted:
    """Train until patience, budget or ``epochs`` ends it; leaves the best weights in the model (without ``validate`` the last)."""
    saver = Checkpoint(job, trainer, loader)
    saved = saver.load()
    if saved:
        job = dataclasses.replace(job, started=job.started - saved["used"])
    stopping, progress = Stopping(job), Progress(job)
    fitted, best = Fitted(stopping), None
    if saved:
        fitted.epochs, fitted.steps, fitted.spent, best = (saved[name] for name in ("epochs", "steps", "spent", "best"))
        stopping.best, stopping.evaluations, stopping.best_evaluation = saved["stopping"]

    while fitted.epochs < epochs and not (fitted.epochs and stopping.stop):  # one step at least, however small the budget
        start, first = time.monotonic(), fitted.steps
        loss = trainer._train_epoch(_within_budget(loader, job, fitted), fitted.epochs)
        fitted.epochs += 1
        metrics = {"loss": float(np.sum(loss)) / (fitted.steps - first)}
        last = fitted.epochs == epochs or job.remaining <= 0
        if validate and (last or fitted.epochs % eval_every == 0):
            metrics["valid_ndcg_at_10"] = validate()
            if stopping.improved(metrics["valid_ndcg_at_10"]):
                best = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        progress.log(fitted.epochs, of=epochs, **metrics)
        fitted.spent += time.monotonic() - start
        state = (stopping.best, stopping.evaluations, stopping.best_evaluation)
        saver.save(
            epochs=fitted.epochs, steps=fitted.steps, spent=fitted.spent, best=best, stopping=state, used=job.budget.seconds - job.remaining
        )
    if best is not None:
        trainer.model.load_state_dict(best)
    return fitted


def _within_budget(loader: TrainDataLoader, job: Job, fitted: Fitted) -> Iterator[Interaction]:
    """The batches of an epoch, at least one, until the budget is spent: a long epoch must not run into the deadline."""
    for batch in loader:
        fitted.steps += 1
        yield batch
        if job.remaining <= 0:
            return


class Checkpoint:
    """Everything that decides how training goes on: weights, optimizer, random states, counters.

    Written after an epoch, but never so often that it costs more than about a tenth of the time.
    """

    def __init__(self, job: Job, trainer: Trainer, loader: TrainDataLoader):
        self.path = job.checkpoint / "last.pth"
        self.trainer, self.loader = trainer, loader
        self._next = 0.0

    def save(self, **more: Any) -> None:
        start = time.monotonic()
        if start < self._next:
            return
        name, keys, *position = np.random.get_state()  # noqa: NPY002 (RecBole draws from the global one)
        states = {
            "model": self.trainer.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "loader": self.loader.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *position],
            "python": random.getstate(),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save({**states, **more}, temporary)
        os.replace(temporary, self.path)
        end = time.monotonic()
        self._next = end + 10 * (end - start)

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        self.trainer.model.load_state_dict(saved["model"])
        self.trainer.optimizer.load_state_dict(saved["optimizer"])
        self.loader.generator.set_state(saved["loader"])
        torch.set_rng_state(saved["torch"])
        if saved["cuda"]:
            torch.cuda.set_rng_state_all(saved["cuda"])
        name, keys, *position = saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002
        version, words, gauss = saved["python"]
        random.setstate((version, tuple(words), gauss))
        return saved


@torch.no_grad()
def rank(model: torch.nn.Module, users: Interaction, n_items: int, k: int) -> np.ndarray:
    """The K best items [U, K] of every user by the model's full ranking; the padding item is left out."""
    model.eval()
    size = max(32, min(2048, 2**25 // n_items))  # a batch of scores has at most 128 MiB
    lists = []
    for start in range(0, len(users), size):
        batch = users[start : start + size].to(model.device)
        scores_BI = model.full_sort_predict(batch).view(len(batch), -1).float()
        lists.append(top_k(scores_BI[:, 1 : n_items + 1], k).cpu())
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
    return torch.nn.functional.pad(items_BK, (0, k - kept), value=-1)
