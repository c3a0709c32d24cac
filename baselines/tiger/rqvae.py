"""RQ-VAE: an autoencoder whose latent vector is a sum of L code vectors. TIGER (arXiv 2305.05065, section 3.1).

In: item embeddings [I, D]. Out: L codes an item. An MLP makes the latent vector z, which is coded level after level,

    r_1 = z,   c_l = argmin_k |r_l - e_lk|^2,   r_(l+1) = r_l - e_lc,   z^ = sum_l e_lc,

and an MLP of the opposite shape reads z^ (the gradient passes straight through the choice). The loss is

    |x - x^|^2  +  sum_l |sg(r_l) - e_lc|^2  +  beta sum_l |r_l - sg(e_lc)|^2        (sg: no gradient),

each square a mean over items and elements, as in public code. The chosen codes are constants in r_(l+1): every level's last term
pulls the encoder, and a code vector learns from its own level only. ``ema`` books have no gradient and no second term: they are
running means of what chose them.

Against collapse: books start from k-means of the untrained encoder's residuals, level after level; a code that nobody chose for
some epochs moves onto the residual of a random item. Distances are fp32; ties go to the lowest index.

LETTER is a subclass with more terms in ``loss``.

Legend: B batch, D input width, Z latent width, L levels, K codes of a book, I items.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from baselines.tiger.codes import health, nearest, residual_codes
from utgrec.kmeans import residual_kmeans

ROWS = 1 << 14
"""Items that are encoded together where no gradient is needed."""
CURVE_POINTS = 100

Told = Callable[[int, dict[str, float]], None]
"""Hears of an epoch and its metrics."""


@dataclass(frozen=True)
class Settings:
    """The defaults are the TIGER paper's (section 4, implementation details) where it says something."""

    hidden: tuple[int, ...] = (512, 256, 128)
    """Inner widths of the encoder; the decoder has them in the opposite order. ReLU between."""
    latent: int = 32
    levels: int = 3
    book: int = 256
    """Codes of a level."""
    beta: float = 0.25
    """Weight of the commitment term."""
    books: str = "gradient"
    """How code vectors learn: ``gradient`` or ``ema``."""
    decay: float = 0.99
    """Of the running means (ema)."""
    optimiser: str = "adagrad"
    """``adagrad`` or ``adamw``."""
    learning_rate: float = 0.4
    accumulator: float = 0.1
    """Where Adagrad's sums of squares start: 0.1 in TensorFlow and optax. Under PyTorch's 0 the first step has the full learning rate
    in every weight, and 0.4 destroys the network."""
    weight_decay: float = 0.0
    batch: int = 1024
    """At most: an epoch is cut into batches of equal size."""
    epochs: int = 20_000
    revive_every: int = 10
    """Epochs after which codes that nobody chose move; 0: never."""
    start_rows: int = 16_384
    """Items for the k-means that books start from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, known in (("books", ("gradient", "ema")), ("optimiser", ("adagrad", "adamw"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: use {' or '.join(map(repr, known))}")
        for name in ("latent", "levels", "book", "batch", "epochs", "start_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use 1 or more")


@dataclass(frozen=True)
class Quantised:
    """What residual quantisation says of a batch of latent vectors; entry l of a tuple is level l."""

    codes_BL: torch.Tensor
    residuals: tuple[torch.Tensor, ...]
    """r_l [B, Z], which pass a gradient on to the encoder."""
    chosen: tuple[torch.Tensor, ...]
    """e_lc [B, Z], which pass it on to the books."""
    sum_BZ: torch.Tensor
    """z^, with the gradient of z."""


class RQVAE(nn.Module):
    def __init__(self, width: int, settings: Settings):
        super().__init__()
        self.settings = settings
        sizes = (width, *settings.hidden, settings.latent)
        self.encoder, self.decoder = mlp(sizes), mlp(sizes[::-1])
        shape_LKZ = (settings.levels, settings.book, settings.latent)
        self.books_LKZ = nn.Parameter(torch.zeros(shape_LKZ), requires_grad=settings.books == "gradient")
        self.chosen_LK: torch.Tensor  # how often since codes were last revived
        self.register_buffer("chosen_LK", torch.zeros(shape_LKZ[:2], dtype=torch.long))
        if settings.books == "ema":
            self.register_buffer("count_LK", torch.zeros(shape_LKZ[:2]))
            self.register_buffer("sum_LKZ", torch.zeros(shape_LKZ))

    # ---------------------------------------------------------------------------------------------------- a step

    def quantise(self, latent_BZ: torch.Tensor) -> Quantised:
        left_BZ, codes, residuals, chosen = latent_BZ.float(), [], [], []
        for book_KZ in self.books_LKZ:
            codes.append(nearest(left_BZ.detach(), book_KZ.detach())[0])
            residuals.append(left_BZ)
            chosen.append(F.embedding(codes[-1], book_KZ))
            left_BZ = left_BZ - chosen[-1].detach()
        return Quantised(torch.stack(codes, 1), tuple(residuals), tuple(chosen), latent_BZ - left_BZ.detach())

    def loss(self, x_BD: torch.Tensor, rows_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], Quantised]:
        """The loss of a batch, its parts for the curves, and its codes. ``rows_B``: which training items these are."""
        quantised = self.quantise(self.encoder(x_BD))
        pairs = list(zip(quantised.residuals, quantised.chosen, strict=True))
        reconstruction = F.mse_loss(self.decoder(quantised.sum_BZ), x_BD)
        commitment = torch.stack([F.mse_loss(r_BZ, e_BZ.detach()) for r_BZ, e_BZ in pairs]).sum()
        loss = reconstruction + self.settings.beta * commitment
        if self.settings.books == "gradient":
            loss = loss + torch.stack([F.mse_loss(e_BZ, r_BZ.detach()) for r_BZ, e_BZ in pairs]).sum()
        return loss, {"reconstruction": reconstruction, "commitment": commitment}, quantised

    @torch.no_grad()
    def after_step(self, quantised: Quantised) -> None:
        """Count the choices; move ``ema`` books to the running means."""
        codes_LB = quantised.codes_BL.t()
        self.chosen_LK.scatter_add_(1, codes_LB, torch.ones_like(codes_LB))
        if self.settings.books == "ema":
            member_LKB = (codes_LB[:, None] == torch.arange(self.settings.book, device=codes_LB.device)[:, None]).float()
            self.count_LK.lerp_(member_LKB.sum(2), 1 - self.settings.decay)
            self.sum_LKZ.lerp_(member_LKB @ torch.stack(quantised.residuals).detach(), 1 - self.settings.decay)
            # Where a count has all but faded away the mean is noise: that code waits to be revived.
            mean_LKZ = self.sum_LKZ / self.count_LK.clamp_min(1e-6)[..., None]
            self.books_LKZ.copy_(torch.where(self.count_LK[..., None] > 1e-3, mean_LKZ, self.books_LKZ))

    def before_epoch(self, epoch: int) -> None:
        """For methods that look at the books between epochs. What they remember belongs into buffers: those are in the checkpoint."""

    # ----------------------------------------------------------------------------------------------------- books

    @torch.no_grad()
    def start(self, x_ID: torch.Tensor, seed: int) -> None:
        """Books from k-means of these items' residuals under the encoder as it is."""
        found = residual_kmeans(self.encode(x_ID), self.settings.levels, self.settings.book, seed=seed)
        self.books_LKZ.copy_(found.books_LKD)
        self._believe(torch.ones_like(self.chosen_LK, dtype=torch.bool))

    @torch.no_grad()
    def revive(self, x_ID: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Move codes that were not chosen since the last call onto residuals of random items. Returns which moved [L, K]."""
        dead_LK = self.chosen_LK == 0
        self.chosen_LK.zero_()
        rows_K = torch.randint(len(x_ID), (self.settings.book,), generator=generator).to(x_ID.device)
        residual_LKZ = torch.stack(self.quantise(self.encoder(x_ID[rows_K])).residuals)
        self.books_LKZ.copy_(torch.where(dead_LK[..., None], residual_LKZ, self.books_LKZ))
        self._believe(dead_LK)
        return dead_LK

    def _believe(self, moved_LK: torch.Tensor) -> None:
        """Give the running means of codes that moved the weight of an average code, or they would jump at the next choice."""
        if self.settings.books == "ema":
            weight = self.settings.batch / self.settings.book
            self.count_LK.masked_fill_(moved_LK, weight)
            self.sum_LKZ.copy_(torch.where(moved_LK[..., None], weight * self.books_LKZ, self.sum_LKZ))

    # ----------------------------------------------------------------------------------------------------- codes

    @torch.no_grad()
    def encode(self, x_ID: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.encoder(part_BD).float() for part_BD in x_ID.split(ROWS)])

    @torch.no_grad()
    def codes(self, x_ID: torch.Tensor) -> torch.Tensor:
        """Codes [I, L] of any items, whether they were trained on or not."""
        return residual_codes(self.encode(x_ID), self.books_LKZ)[0]


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between. Xavier's initialisation, no biases at first: with PyTorch's own, the signal shrinks from layer
    to layer until the biases drown it, and all items start with nearly one latent vector."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(sizes):
        layer = nn.Linear(inner, outer)
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Trained:
    """How far training came, over all starts of the process."""

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    revived: int = 0
    """Codes moved, over all epochs."""
    stopped_by: str = "epochs"
    metrics: dict[str, float] = field(default_factory=dict)
    """The last point of the curves."""


class Training:
    """The training loop: batches out of memory, curves, and a checkpoint that an interrupted run goes on from to the same weights.

    ``x_ID``: the items to train on, on the model's device. ``seconds``: what it may take, earlier starts included; at least one
    step is made. ``told(epoch, metrics)`` hears about ``CURVE_POINTS`` times how it goes.
    """

    def __init__(
        self,
        model: RQVAE,
        x_ID: torch.Tensor,
        *,
        seed: int,
        checkpoint: Path,
        seconds: float,
        told: Callable[[int, dict[str, float]], None],
    ):
        self.model, self.x_ID, self.settings, self.told = model, x_ID, model.settings, told
        self.file, self.seconds, self.seed = checkpoint / "last.pt", seconds, seed
        self.generator = torch.Generator().manual_seed(seed)  # the order of items and which of them revive codes
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        if self.settings.optimiser == "adagrad":
            start = self.settings.accumulator
            self.optimiser: torch.optim.Optimizer = torch.optim.Adagrad(
                parameters, rate, weight_decay=decay, initial_accumulator_value=start, fused=not x_ID.is_cuda
            )
        else:
            self.optimiser = torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)
        self.trained = Trained()
        self._save_after = 0.0

    def run(self) -> Trained:
        """Train until the epochs or the seconds are spent."""
        settings, began = self.settings, time.monotonic()
        if self.file.exists():
            self._restore()
        else:
            rows = torch.randperm(len(self.x_ID), generator=self.generator)[: settings.start_rows].to(self.x_ID.device)
            self.model.start(self.x_ID[rows], self.seed)
        trained = self.trained
        self._began = began - trained.seconds
        every = max(1, settings.epochs // CURVE_POINTS)
        while trained.epochs < settings.epochs and not (trained.steps and self._spent):
            parts = self._epoch()
            trained.epochs += 1
            if settings.revive_every and trained.epochs % settings.revive_every == 0 and trained.epochs < settings.epochs:
                self._revive()
            if trained.epochs % every == 0 or trained.epochs in (1, settings.epochs) or self._spent:
                trained.metrics = {name: float(value) for name, value in parts.items()}
                trained.metrics |= health(self.model.codes(self.x_ID), settings.book)
                self.told(trained.epochs, trained.metrics)
            trained.seconds = time.monotonic() - self._began
            self._save()
        trained.stopped_by = "epochs" if trained.epochs == settings.epochs else "budget"
        return trained

    @property
    def _spent(self) -> bool:
        return time.monotonic() - self._began >= self.seconds

    def _epoch(self) -> dict[str, torch.Tensor]:
        """One pass over the items, cut short when the seconds are spent. Returns the mean of each part of the loss."""
        self.model.before_epoch(self.trained.epochs)
        total: dict[str, torch.Tensor] = {}
        order = torch.randperm(len(self.x_ID), generator=self.generator).to(self.x_ID.device)
        first = self.trained.steps
        for rows_B in order.tensor_split(-(-len(order) // self.settings.batch)):
            loss, parts, quantised = self.model.loss(self.x_ID[rows_B], rows_B)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.model.after_step(quantised)
            self.trained.steps += 1
            for name, value in parts.items():
                total[name] = total.get(name, 0.0) + value.detach()
            if self._spent:
                break
        return {name: value / (self.trained.steps - first) for name, value in total.items()}

    def _revive(self) -> None:
        """Revive codes, and let the optimiser forget what it knew of those that moved."""
        dead_LK = self.model.revive(self.x_ID, self.generator)
        self.trained.revived += int(dead_LK.sum())
        for name, value in self.optimiser.state.get(self.model.books_LKZ, {}).items():
            if value.shape == self.model.books_LKZ.shape:
                value[dead_LK] = self.settings.accumulator if name == "sum" else 0.0

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all: at the end, and before it never so often that it costs more than a tenth of the
        time."""
        start = time.monotonic()
        if start < self._save_after and self.trained.epochs < self.settings.epochs:
            return
        state = {
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "trained": dataclasses.asdict(self.trained),
        }
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.file)
        self._save_after = time.monotonic() + 10 * (time.monotonic() - start)

    def _restore(self) -> None:
        saved = torch.load(self.file, map_location="cpu", weights_only=True)
        if saved["settings"] != dataclasses.asdict(self.settings):
            raise ValueError(f"{self.file}: the checkpoint of another configuration; delete it to start anew")
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"])
        self.trained = dataclasses.replace(self.trained, **saved["trained"])
