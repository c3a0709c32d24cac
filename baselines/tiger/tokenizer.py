"""TIGER's tokenizer: item texts -> embeddings -> codes -> semantic ids.

In: a job and the keys of its configuration. Out: ``SemanticIds`` (L codes and a digit that tells items of one tuple apart), and a
``Meta``. Sentence embeddings of the texts (embed.py) are prepared, then quantised by an RQ-VAE (rqvae.py) or by residual k-means
(kmeans.py). Whatever is fitted sees the items that occur in training interactions only; codes are given to all.

LETTER calls ``tokenise`` with a model, and perhaps a repair of collisions, of its own.

Legend: I items, T items that occur in training, D width, P components, L levels, K codes of a book, Z width of what is quantised.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from baselines.tiger import rqvae
from baselines.tiger.codes import health, residual_codes
from baselines.tiger.embed import embed
from harness.contract import ContractError, Job, Meta, Progress, skip
from utgrec.kmeans import residual_kmeans
from utgrec.semantic_ids import ExtraDigit, SemanticIds

PREFIX = "vae_"
"""Keys of the RQ-VAE begin with it."""
SHARED = ("levels", "book")
"""Of rqvae.Settings, but without the prefix: residual k-means has them, too."""

MakeModel = Callable[[int, rqvae.Settings, torch.Tensor], rqvae.RQVAE]
"""From the input's width, the settings and the numbers of the T training items."""
Repair = Callable[[SemanticIds, torch.Tensor, torch.Tensor], SemanticIds]
"""From raw codes, what was quantised [I, Z] and the books [L, K, Z] to ids that name one item each."""


@dataclass(frozen=True)
class Settings:
    encoder: str = "sentence-transformers/sentence-t5-base"
    """Hub id, folder, or the name of a packaged model."""
    encoder_revision: str = ""
    """Commit, tag or branch of a hub model."""
    text_tokens: int = 0
    """Cut texts there; 0: where the encoder does."""
    missing_text: float = 0.2
    """Share of items that may lack a text."""
    inputs: str = "plain"
    """What the quantiser reads: ``plain`` embeddings; ``standard``: mean 0 and variance 1 in each dimension; ``whiten``: the first
    ``components`` principal components, each with variance 1. Fitted on the training items."""
    components: int = 128
    quantiser: str = "rqvae"
    """``rqvae`` or ``rkmeans``."""
    levels: int = 3
    book: int = 256
    """Codes of a level."""
    kmeans_steps: int = 20
    kmeans_restarts: int = 1
    tokenizer_share: float = 0.5
    """Share of the budget's seconds that training the RQ-VAE may take; the recommender gets what it leaves."""
    vae: rqvae.Settings = field(default_factory=rqvae.Settings)

    def __post_init__(self) -> None:
        for name, known in (("inputs", ("plain", "standard", "whiten")), ("quantiser", ("rqvae", "rkmeans"))):
            if getattr(self, name) not in known:
                raise ContractError(f"{name} = {getattr(self, name)!r}: use {', '.join(map(repr, known))}")
        for name in ("missing_text", "tokenizer_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ContractError(f"{name} = {getattr(self, name)}: use a share from 0 to 1")
        for name in ("levels", "book", "components", "kmeans_steps", "kmeans_restarts"):
            if getattr(self, name) < 1:
                raise ContractError(f"{name} = {getattr(self, name)}: use 1 or more")

    @classmethod
    def take(cls, configuration: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """The settings in a method's configuration, and the keys that are left. Raises ContractError for a wrong value."""
        rest = dict(configuration)
        own = {name: checked(name, rest.pop(name), getattr(cls, name)) for name in OWN_KEYS if name in rest}
        vae = {name: checked(key, rest.pop(key), getattr(rqvae.Settings, name)) for key, name in VAE_KEYS.items() if key in rest}
        vae |= {name: own[name] for name in SHARED if name in own}
        if wrong := [key for key in rest if key.startswith(PREFIX)]:
            near = difflib.get_close_matches(wrong[0], VAE_KEYS, 1)
            raise ContractError(f"configuration keys {wrong} are unknown{f'; did you mean {near[0]!r}?' if near else ''}")
        try:
            return cls(**own, vae=rqvae.Settings(**vae)), rest
        except ValueError as error:
            raise ContractError(f"{PREFIX}{error}" if not isinstance(error, ContractError) else str(error)) from None


OWN_KEYS = tuple(entry.name for entry in dataclasses.fields(Settings) if entry.name != "vae")
VAE_KEYS = {PREFIX + entry.name: entry.name for entry in dataclasses.fields(rqvae.Settings) if entry.name not in SHARED}
KEYS = (*OWN_KEYS, *VAE_KEYS)
"""What decides the ids: ``uses`` of the stage in method.toml names these."""


def checked(key: str, value: Any, default: Any) -> Any:
    """TOML knows 1 and 1.0 apart and Python's True is a 1: take the kind of the default, and a whole number for a float."""
    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and all(type(width) is int and width > 0 for width in value):
            return tuple(value)
        raise ContractError(f"{key} = {value!r}: this key takes a list of widths")
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ContractError(f"{key} = {value!r}: this key takes {type(default).__name__}")
    return value


def tokenise(job: Job, settings: Settings, make_model: MakeModel | None = None, repair: Repair | None = None) -> tuple[SemanticIds, Meta]:
    """The ids of the job's domain. ``make_model``: another RQ-VAE than TIGER's. ``repair``: another way than the digit."""
    torch.set_num_threads(job.budget.threads)
    torch.manual_seed(job.seed)
    domain, progress = job.domain, Progress(job)
    texts, items_T = domain.texts, torch.from_numpy(np.unique(domain.train.values)).long()
    if not len(items_T):
        skip(job, "the domain has no training interaction to fit a tokenizer on")
    if not any(text.strip() for text in texts):
        skip(job, "needs item text; the domain has none")
    begin = time.monotonic()
    embeddings = embed(
        texts,
        settings.encoder,
        cache=job.cache,
        revision=settings.encoder_revision,
        tokens=settings.text_tokens,
        allow_missing=settings.missing_text,
        device=job.device,
        told=lambda done: progress.log(done, of=len(texts)),
    )
    embedded = time.monotonic()
    x_ID = prepare(torch.from_numpy(embeddings.x_ID), items_T, settings).to(job.device)
    quantise = _rkmeans if settings.quantiser == "rkmeans" else _rqvae
    quantised_IZ, books_LKZ, meta = quantise(job, settings, x_ID, items_T.to(job.device), progress, make_model)
    codes_IL = residual_codes(quantised_IZ, books_LKZ)[0]
    raw = SemanticIds.of(codes_IL.cpu().numpy(), widths=(settings.book,) * settings.levels)
    ids = repair(raw, quantised_IZ, books_LKZ) if repair else ExtraDigit().repair(raw)
    meta.timings = {"embed": embedded - begin, "fit": time.monotonic() - embedded, **meta.timings}
    about = {"inputs": _in_words(settings, x_ID), "quantiser": settings.quantiser, "items_trained_on": len(items_T)}
    report = {**embeddings.about, **about, **meta.extra, **health(codes_IL, settings.book), **ids.report}
    report["tokenizer_seconds"] = meta.timings["fit"]
    meta.extra = report
    return dataclasses.replace(ids, report=report), meta


def _rkmeans(
    job: Job, settings: Settings, x_ID: torch.Tensor, items_T: torch.Tensor, progress: Progress, make_model: MakeModel | None
) -> tuple[torch.Tensor, torch.Tensor, Meta]:
    x_TD = x_ID[items_T]
    spread = float((x_TD - x_TD.mean(0)).square().sum(1).mean()) or 1.0
    found = residual_kmeans(
        x_TD,
        settings.levels,
        settings.book,
        seed=job.seed,
        steps=settings.kmeans_steps,
        restarts=settings.kmeans_restarts,
        told=lambda level, error: progress.log(level, of=settings.levels, reconstruction=error, unexplained=error / spread),
    )
    extra = {"reconstruction": found.error_L[-1], "unexplained": found.error_L[-1] / spread}
    return x_ID, found.books_LKD, Meta(parameters=found.books_LKD.numel(), stopped_by="closed form", extra=extra)


def _rqvae(
    job: Job, settings: Settings, x_ID: torch.Tensor, items_T: torch.Tensor, progress: Progress, make_model: MakeModel | None
) -> tuple[torch.Tensor, torch.Tensor, Meta]:
    x_TD = x_ID[items_T]
    spread = float((x_TD - x_TD.mean(0)).square().mean()) or 1.0

    def told(epoch: int, metrics: dict[str, float]) -> None:
        progress.log(epoch, of=settings.vae.epochs, **metrics, unexplained=metrics["reconstruction"] / spread)

    model = (make_model or _plain)(x_ID.size(1), settings.vae, items_T).to(job.device)
    seconds = settings.tokenizer_share * job.budget.seconds
    trained = rqvae.Training(model, x_TD, seed=job.seed, checkpoint=job.checkpoint, seconds=seconds, told=told).run()
    error = trained.metrics["reconstruction"]
    extra = {"reconstruction": error, "unexplained": error / spread, "codes_revived": trained.revived}
    extra |= {"tokenizer_epochs": trained.epochs, "tokenizer_steps": trained.steps, "tokenizer_stopped_by": trained.stopped_by}
    meta = Meta(
        timings={"fit": trained.seconds},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=trained.steps,
        epochs=trained.epochs,
        stopped_by=trained.stopped_by,
        budget_bound=trained.stopped_by == "budget",
        precision="fp32",
        extra=extra,
    )
    return model.encode(x_ID), model.books_LKZ.detach(), meta


def _plain(width: int, settings: rqvae.Settings, items_T: torch.Tensor) -> rqvae.RQVAE:
    return rqvae.RQVAE(width, settings)


def prepare(x_ID: torch.Tensor, items_T: torch.Tensor, settings: Settings) -> torch.Tensor:
    """What the quantiser reads, by ``settings.inputs``; fitted on the training items in fp64."""
    if settings.inputs == "plain":
        return x_ID.float()
    x_TD = x_ID[items_T].double()
    centred_ID = x_ID.double() - x_TD.mean(0)
    if settings.inputs == "standard":
        return (centred_ID / x_TD.std(0, unbiased=False).clamp_min(1e-8)).float()
    variance_D, axes_DD = torch.linalg.eigh(torch.cov(x_TD.t(), correction=0).reshape(x_TD.size(1), -1))
    keep = variance_D.flip(0)[: settings.components] > 1e-7 * variance_D[-1]  # fewer where the items span fewer
    kept = max(1, int(keep.sum()))
    axes_DP = axes_DD.flip(1)[:, :kept]
    axes_DP = axes_DP * axes_DP.gather(0, axes_DP.abs().argmax(0, keepdim=True)).sign()  # an axis has no sign of its own
    return (centred_ID @ axes_DP / variance_D.flip(0)[:kept].clamp_min(1e-12).sqrt()).float()


def _in_words(settings: Settings, x_ID: torch.Tensor) -> str:
    words = {"plain": "as they are", "standard": "standardised", "whiten": f"whitened, {x_ID.size(1)} principal components"}
    return f"{x_ID.size(1)} dimensions, {words[settings.inputs]}"
