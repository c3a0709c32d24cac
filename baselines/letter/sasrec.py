"""SASRec, the source of LETTER's collaborative vectors: one vector for each item that occurs in the training part.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, with a softmax over the whole catalogue as its loss.
LETTER takes the item embeddings of a trained SASRec; its authors do not say on which part of the data theirs was trained.
Here it is the training part alone: every gradient comes from a training row, the validation items only choose the epoch.

In: a job and settings. Out: vectors [I, D], which items were seen in training [I], and what training has to say (``Meta``).
Killed and started again it goes on from its last epoch and ends with the same vectors.

Shape legend: W windows, B batch, L history length, T positions with a target, U users, I items, D width, H heads.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from harness.contract import HISTORY, ContractError, Domain, Job, Meta, Progress, Ragged, Stopping, ndcg_at_10

LOGITS = 2**25
"""Scores that are in memory at a time: 128 MiB, as much again for their gradient, and on a GPU 8 times as many."""


@dataclass(frozen=True)
class Settings:
    width: int = 32
    """Of the item vectors: LETTER needs that of its codebooks."""
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    learning_rate: float = 1e-3
    batch: int = 256
    """Windows in a step."""
    epochs: int = 200
    """At most; the stopping rule of the contract usually ends it earlier."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ContractError(f"sasrec_{name} = {getattr(self, name)}: use 1 or more")
        if self.width % self.heads:
            raise ContractError(f"sasrec_heads = {self.heads}: must divide the width {self.width} (vae_latent)")
        if not 0 <= self.dropout < 1:
            raise ContractError(f"sasrec_dropout = {self.dropout}: use a share below 1")


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each on a normalised input and added to it."""

    def __init__(self, settings: Settings):
        super().__init__()
        width = settings.width
        self.heads, self.dropout = settings.heads, settings.dropout
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query_key_value, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(4 * width, width))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BLD.shape
        mixed = self.to_query_key_value(self.norm_attention(x_BLD)).view(batch, length, 3, self.heads, width // self.heads)
        query_BHLd, key_BHLd, value_BHLd = mixed.permute(2, 0, 3, 1, 4)
        lost = self.dropout if self.training else 0.0
        # Histories end with padding, so a causal mask keeps it out of sight by itself.
        seen_BHLd = F.scaled_dot_product_attention(query_BHLd, key_BHLd, value_BHLd, is_causal=True, dropout_p=lost)
        x_BLD = x_BLD + F.dropout(self.from_heads(seen_BHLd.transpose(1, 2).reshape(batch, length, width)), self.dropout, self.training)
        return x_BLD + F.dropout(self.feed(self.norm_feed(x_BLD)), self.dropout, self.training)


class SASRec(nn.Module):
    def __init__(self, n_items: int, settings: Settings):
        super().__init__()
        self.dropout = settings.dropout
        self.items = nn.Embedding(n_items + 1, settings.width, padding_idx=0)  # item number + 1; 0 is padding
        self.positions = nn.Parameter(torch.empty(HISTORY, settings.width))
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)
        for parameter in (self.items.weight, self.positions):
            nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            self.items.weight[0] = 0

    def forward(self, items_BL: torch.Tensor) -> torch.Tensor:
        """The user's state [B, L, D] after each item of histories that are filled up with 0 at the end."""
        x_BLD = F.dropout(self.items(items_BL) + self.positions[: items_BL.size(1)], self.dropout, self.training)
        return self.norm(self.blocks(x_BLD))

    def scores(self, state_TD: torch.Tensor) -> torch.Tensor:
        """[T, I], column n = item number n."""
        return state_TD @ self.items.weight[1:].T


def windows(train: Ragged, length: int = HISTORY) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [W, L] (item number + 1, then 0) in which every training row stands once, as a position of a window.

    A user's list is cut from its end, as SASRec does with the list that it keeps; what it would drop becomes windows, too.
    """
    rows_U = np.maximum(train.lengths - 1, 0)
    windows_U = -(-rows_U // length)
    user_W = np.repeat(np.arange(len(train)), windows_U)
    from_end_W = np.cumsum(windows_U)[user_W] - np.arange(len(user_W))  # windows from this one to the user's last, itself included
    end_W = rows_U[user_W] - (from_end_W - 1) * length
    start_W = np.maximum(end_W - length, 0)
    offsets = np.concatenate([[0], np.cumsum(end_W - start_W)])
    place = np.repeat(train.offsets[:-1][user_W] + start_W - offsets[:-1], end_W - start_W) + np.arange(offsets[-1])
    inputs, targets = (Ragged(train.values[place + shift], offsets).padded(length) for shift in (0, 1))
    return inputs.astype(np.int64) + 1, targets.astype(np.int64) + 1


def item_vectors(job: Job, settings: Settings) -> tuple[np.ndarray, np.ndarray, Meta]:
    """Train, and give the vectors [I, D], which items occur in the training part [I], and the meta of the stage."""
    torch.manual_seed(job.seed)
    domain = job.domain
    training = Training(job, settings, domain)
    meta = training.run()
    seen_I = np.bincount(domain.train.values, minlength=domain.n_items) > 0
    return training.model.items.weight[1:].detach().float().cpu().numpy(), seen_I, meta


class Training:
    """The training loop and everything that decides how it goes on (its checkpoint)."""

    def __init__(self, job: Job, settings: Settings, domain: Domain):
        self.job, self.settings, self.domain = job, settings, domain
        self.model = SASRec(domain.n_items, settings).to(job.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
        self.inputs_WL, self.targets_WL = (torch.from_numpy(side) for side in windows(domain.train))
        self.order = torch.Generator().manual_seed(job.seed)  # apart from the generator of dropout
        self.epoch, self.steps, self.spent = 0, 0, 0.0
        self.best: dict[str, torch.Tensor] | None = None
        self.rows = max(32, LOGITS * (8 if job.device == "cuda" else 1) // domain.n_items)  # of scores at a time
        self._save_after = 0.0

    def run(self) -> Meta:
        """Train until patience, budget or the number of epochs ends it; leaves the best weights in the model."""
        checkpoint = self.job.checkpoint / "last.pt"
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
        # What an interrupted start has used counts: the budget is the stage's, not the process's.
        job = dataclasses.replace(self.job, started=self.job.started - saved["used"]) if saved else self.job
        stopping, progress = Stopping(job), Progress(job)
        if saved:
            self.restore(saved, stopping)
        while self.epoch < self.settings.epochs and not (self.epoch and stopping.stop):  # one epoch at least, however small the budget
            start = time.monotonic()
            loss = self.train_epoch(job)
            self.epoch += 1
            value = self.validate()
            if stopping.improved(value):
                self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            progress.log(self.epoch, of=self.settings.epochs, sasrec_loss=loss, sasrec_valid_ndcg_at_10=value)
            self.spent += time.monotonic() - start
            self.save(job, stopping)
        assert self.best is not None
        self.model.load_state_dict(self.best)
        return Meta(
            timings={"fit": self.spent},
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            steps=self.steps,
            epochs=self.epoch,
            peak_device_bytes=torch.cuda.max_memory_allocated() if job.device == "cuda" else None,
            precision=job.precision,
            **stopping.meta,
        )

    def train_epoch(self, job: Job) -> float:
        """One pass over the windows, cut short when the budget is spent. Returns the mean loss of its steps."""
        self.model.train()
        losses = []
        for rows_B in torch.randperm(len(self.inputs_WL), generator=self.order).split(self.settings.batch):
            self.optimizer.zero_grad()
            losses.append(self.backward(self.inputs_WL[rows_B].to(job.device), self.targets_WL[rows_B].to(job.device)))
            self.optimizer.step()
            self.steps += 1
            if job.remaining <= 0:
                break
        return float(torch.stack(losses).mean())

    def backward(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        """The gradient of the mean loss over all positions with a target. Their scores are made a part at a time, and each part's
        gradient is left at the states, from where all of it goes back at once."""
        there_BL, loss = targets_BL > 0, torch.zeros((), device=targets_BL.device)
        wanted_T = targets_BL[there_BL] - 1
        with torch.autocast(self.job.device, torch.bfloat16, enabled=self.job.precision == "bf16"):
            state_TD = self.model(inputs_BL)[there_BL]
            leaf_TD = state_TD.detach().requires_grad_()
            for part_TD, part_T in zip(leaf_TD.split(self.rows), wanted_T.split(self.rows), strict=True):
                part = F.cross_entropy(self.model.scores(part_TD).float(), part_T, reduction="sum") / len(wanted_T)
                part.backward()
                loss += part.detach()
        state_TD.backward(leaf_TD.grad)
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """NDCG@10 of the validation items in a full ranking."""
        self.model.eval()
        inputs = self.domain.valid_inputs()
        history_UL = torch.from_numpy(inputs.padded(HISTORY).astype(np.int64) + 1)
        last_U = torch.from_numpy(np.maximum(inputs.lengths - 1, 0))
        size, lists = min(2048, self.rows), []
        for part_BL, last_B in zip(history_UL.split(size), last_U.split(size), strict=True):
            state_BLD = self.model(part_BL.to(self.job.device))
            scores_BI = self.model.scores(state_BLD[torch.arange(len(last_B)), last_B])
            lists.append(scores_BI.topk(min(10, self.domain.n_items)).indices.cpu())
        return ndcg_at_10(torch.cat(lists).numpy(), self.domain.valid)

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
