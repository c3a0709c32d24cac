"""UTGRec: a universal item tokenizer and a transferable generative recommender. arXiv 2504.04405.

Stages, each cached by itself; the first two are shared by all targets of a suite:

    pretrain_tokenizer      the tokenizer, on the items of all pre-training domains together
    pretrain_recommender    these domains' ids by that tokenizer; one T5 on all their histories
    adapt                   the tokenizer on the target's items (E stays, W and the rest learn), then the target's ids
    fit                     the T5 on the target's histories; predictions

A configuration may leave stages out: without the first the tokenizer starts in ``adapt``, without the second the T5 in ``fit``.

The budget is the run's: adaptation may take ``tokenizer_share`` of it and the recommender gets what is left, as with TIGER. Each
pre-training stage has the same budget once more; what it took is in the record.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.contract import Domain, Job, Meta, Progress, main, skip
from utgrec.configuration import Configuration, refuse
from utgrec.recommender.corpora import Corpus
from utgrec.recommender.processes import Processes
from utgrec.recommender.run import MODEL, pretrain_with, recommend_with
from utgrec.recommender.settings import Settings as RecommenderSettings
from utgrec.semantic_ids import SemanticIds
from utgrec.tokenizer import memory, saved
from utgrec.tokenizer.data import Catalogue
from utgrec.tokenizer.encode import semantic_ids
from utgrec.tokenizer.encoder import make_encoder
from utgrec.tokenizer.model import Latents, UniversalTokenizer
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.train import Phase, Training
from utgrec.tokenizer.vae import Moments, make_vae

TOKENIZER, IDS = "tokenizer", "ids.npz"


@dataclass(frozen=True)
class Pretraining(Configuration):
    """How pre-training of the recommender differs from its training on the target (MTGRec's values; the paper gives none)."""

    pretrain_epochs: int = 200
    pretrain_learning_rate: float = 5e-3
    pretrain_warmup_steps: int = 10_000

    def check(self) -> None:
        self._at_least(1, "pretrain_epochs")
        self._at_least(0, "pretrain_warmup_steps")
        self._above_zero("pretrain_learning_rate")

    def of_recommender(self, settings: RecommenderSettings) -> RecommenderSettings:
        changes = {"epochs": self.pretrain_epochs, "learning_rate": self.pretrain_learning_rate, "warmup_steps": self.pretrain_warmup_steps}
        return dataclasses.replace(settings, **changes, schedule_epochs=0)


TOKENIZER_KEYS, RECOMMENDER_KEYS, PRETRAINING_KEYS = Settings.keys(), RecommenderSettings.keys(), Pretraining.keys()
ADAPTING = ("adapt", "adapt_epochs", "adapt_learning_rate", "tokenizer_share")
STAGE_KEYS = {
    "pretrain_tokenizer": tuple(key for key in TOKENIZER_KEYS if key not in ADAPTING),
    "pretrain_recommender": (*(key for key in TOKENIZER_KEYS if key not in ADAPTING), *RECOMMENDER_KEYS, *PRETRAINING_KEYS),
    "adapt": TOKENIZER_KEYS,
}
"""What decides the outcome of a stage: its ``uses`` in method.toml."""


def settings_of(configuration: Mapping[str, Any]) -> tuple[Settings, RecommenderSettings, Pretraining]:
    tokenizer, rest = Settings.take(configuration)
    recommender, rest = RecommenderSettings.take(rest)
    pretraining, rest = Pretraining.take(rest)
    refuse(rest, (*TOKENIZER_KEYS, *RECOMMENDER_KEYS, *PRETRAINING_KEYS))
    return tokenizer, recommender, pretraining


# ------------------------------------------------------------------------------------------------------------ stages


def pretrain_tokenizer(job: Job) -> None:
    settings, *_ = settings_of(job.configuration)
    domains = [Domain.read(reference.path) for reference in job.domains]
    with Processes.of(job.device) as processes:
        model, meta = train_tokenizer(job, settings, domains, processes, "pretrain")
        if processes.first:
            saved.save(job.output / TOKENIZER, model, {"trained_on": [domain.name for domain in domains]})
            meta.write(job)


def pretrain_recommender(job: Job) -> None:
    settings, recommender, pretraining = settings_of(job.configuration)
    domains = [Domain.read(reference.path) for reference in job.domains]
    with Processes.of(job.device) as processes:
        model = saved.load(job.inputs["pretrain_tokenizer"] / TOKENIZER, settings, device=processes.device, precision=job.precision)
        catalogue = prepared(job, settings, Catalogue(domains, model.encoder, settings, seed=job.seed))
        ids = [ids_of(job, model, catalogue, number, processes) for number in range(len(domains))]
    corpora = [Corpus(domain, of) for domain, of in zip(domains, ids, strict=True)]
    moved = {f"items_moved_{domain.name}": of.report["items_moved"] for domain, of in zip(domains, ids, strict=True)}
    pretrain_with(job, corpora, pretraining.of_recommender(recommender), extra=moved).write(job)


def adapt(job: Job) -> None:
    settings, *_ = settings_of(job.configuration)
    before = job.inputs.get("pretrain_tokenizer")
    with Processes.of(job.device) as processes:
        if before and settings.adapt == "none":
            model = saved.load(before / TOKENIZER, settings, device=processes.device, precision=job.precision)
            meta = Meta(stopped_by="not trained")
        else:
            seconds = settings.tokenizer_share * job.budget.seconds
            model, meta = train_tokenizer(job, settings, [job.domain], processes, "adapt", before and before / TOKENIZER, seconds)
        catalogue = prepared(job, settings, Catalogue([job.domain], model.encoder, settings, seed=job.seed))
        begin = time.monotonic()
        ids = ids_of(job, model, catalogue, 0, processes)
        meta.timings["encode"] = time.monotonic() - begin
        started = "pre-trained tokenizer" if before else "random weights"
        about = {**model.encoder.describe(), "tokenizer_started_from": started, "tokenizer_adapt": settings.adapt if before else "all"}
        about |= {"tokenizer_stopped_by": meta.stopped_by, "tokenizer_seconds": meta.timings.get("fit", 0.0)}
        meta.extra = {**meta.extra, **about, **ids.report}
        if processes.first:
            dataclasses.replace(ids, report={**ids.report, **about}).save(job.output / IDS)
            saved.save(job.output / TOKENIZER, model, {"trained_on": [job.domain.name], "started_from": started})
            meta.write(job)


def fit(job: Job) -> None:
    _, recommender, _ = settings_of(job.configuration)
    ids = SemanticIds.load(job.inputs["adapt"] / IDS)
    # The budget is the run's: what adaptation has taken is not there any more for the recommender.
    left = job.budget.seconds - float(ids.report["tokenizer_seconds"])
    job = dataclasses.replace(job, budget=dataclasses.replace(job.budget, seconds=left))
    before = job.inputs.get("pretrain_recommender")
    recommend_with(job, ids, recommender, init=before and before / MODEL).write(job)


# ------------------------------------------------------------------------------------------------------- their parts


def train_tokenizer(
    job: Job,
    settings: Settings,
    domains: Sequence[Domain],
    processes: Processes,
    phase: Phase,
    start: Path | None = None,
    seconds: float | None = None,
) -> tuple[UniversalTokenizer, Meta]:
    """``start``: a saved tokenizer to go on from; None: random weights around the encoder's own."""
    torch.set_num_threads(job.budget.threads)
    torch.manual_seed(job.seed)
    texts = [text for domain in domains for text in domain.texts]
    if settings.use_text and not any(text.strip() for text in texts):
        skip(job, f"needs item text; {', '.join(domain.name for domain in domains)} has none")
    begin = time.monotonic()
    moments, latents = read_pictures(job, settings, domains)
    if start:
        model = saved.load(start, settings, device=processes.device, precision=job.precision)
    else:
        encoder = make_encoder(settings, training_texts(domains), seed=job.seed, device=processes.device, precision=job.precision)
        model = UniversalTokenizer(settings, encoder, latents).to(processes.device)
    catalogue = prepared(job, settings, Catalogue(domains, model.encoder, settings, seed=job.seed, moments=moments))
    sample = catalogue.prompts(catalogue.train_X[:: max(1, len(catalogue.train_X) // 256)])
    needed = memory.estimate(model, settings, processes, job.precision, max(map(len, sample)))
    if processes.first:
        print(f"{phase}: {len(catalogue.train_X):,} items of {len(domains)} domains; memory about {needed}", flush=True)
    memory.check(needed, settings, processes, job.budget.memory)
    seconds_before = time.monotonic() - begin
    training = Training(job, settings, catalogue, model, processes, phase=phase, fresh=start is None, seconds=seconds)
    if processes.first:
        print(f"{phase}: {training.total:,} steps of {settings.tokenizer_batch} items", flush=True)
    meta = training.run()
    meta.timings["prepare"] = seconds_before
    meta.attention = str(model.encoder.describe().get("attention"))
    meta.extra = {"memory_estimate_bytes": needed.total, "tokenizer_steps": meta.steps, "items_trained_on": len(catalogue.train_X)}
    pictured = sum(len(of) for of in moments if of is not None)
    meta.extra |= {"pictures_rebuilt": pictured, "vae": settings.vae if settings.picture_decoder else "none"}
    return model, meta


def prepared(job: Job, settings: Settings, catalogue: Catalogue) -> Catalogue:
    """With what the frozen vision tower says of every picture, if settings want it computed once."""
    if settings.cache_pictures and settings.use_pictures:
        pictures = (domain.pictures[item] for domain in catalogue.domains for item in range(domain.n_items))
        catalogue.encoder.cache_pictures(pictures, job.cache / "pictures")
    return catalogue


def training_texts(domains: Sequence[Domain]) -> list[str]:
    """Of items that occur in training interactions."""
    return [text for domain in domains for text in np.array(domain.texts, object)[np.unique(domain.train.values)]]


def read_pictures(job: Job, settings: Settings, domains: Sequence[Domain]) -> tuple[list[Moments | None], Latents]:
    """What the VAE says of each domain's pictures (None without any), and the shape of it."""
    if not settings.picture_decoder:
        return [None] * len(domains), Latents(0, 0)
    vae = make_vae(settings).to(job.device)
    moments = [Moments.of(domain, vae, job.cache) if len(domain.pictures) else None for domain in domains]
    return moments, Latents(vae.latents, vae.channels)


def ids_of(job: Job, model: UniversalTokenizer, catalogue: Catalogue, domain: int, processes: Processes) -> SemanticIds:
    of, progress = catalogue.domains[domain], Progress(job) if processes.first else None
    told = (lambda done: progress.log(done, of=of.n_items)) if progress else None
    return semantic_ids(model, catalogue, domain, processes, precision=job.precision, folder=job.cache / "codes", told=told)


STAGES = {"pretrain_tokenizer": pretrain_tokenizer, "pretrain_recommender": pretrain_recommender, "adapt": adapt, "fit": fit}

if __name__ == "__main__":
    main(lambda job: STAGES[job.stage](job))
