"""The whole life of a generative recommender: from semantic ids to predictions. What every such method calls once it has ids.

In: a job, the semantic ids of its domain, settings. Out: predictions.npz, valid_predictions.npz, progress.jsonl, and a Meta,
to which the method may add before it writes it.

    ids = ...                                                       # the method's own part: a tokenizer
    meta = recommend_with(job, ids, Settings.of(job.configuration))
    meta.write(job)

``pretrain_with`` trains one model on several domains and leaves it in the output folder; ``recommend_with(init=...)`` starts
from it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.contract import HISTORY, ContractError, Job, Meta, Ragged, write_predictions
from utgrec.recommender.checkpoint import describe, load_model, save_model
from utgrec.recommender.corpora import Corpus, check_token_space
from utgrec.recommender.model import T5
from utgrec.recommender.processes import Processes
from utgrec.recommender.settings import Settings
from utgrec.recommender.train import Training
from utgrec.semantic_ids import SemanticIds

MODEL = "model"
"""The folder of the weights, in the output folder."""


def recommend_with(
    job: Job, ids: SemanticIds, settings: Settings, *, extra: dict[str, Any] | None = None, init: Path | None = None
) -> Meta:
    """Train on the job's domain, rank the catalogue for every user, write both predictions.

    ``init``: the folder of a saved model to start from. ``extra``: what the method wants to have in ``Meta.extra``.
    """
    if settings.beams < job.k:
        raise ContractError(f"beams = {settings.beams}: the job wants lists of {job.k}; use {job.k} beams or more")
    corpus = Corpus(domain := job.domain, ids)
    with Processes.of(job.device) as processes:
        training = prepare(job, settings, [corpus], processes, init)
        meta = training.run()
        items_VK, invalid, meta.timings["predict"] = rank(training, domain.test_inputs(), domain.test_users, job.k)
        valid_VK, _, meta.timings["predict_valid"] = rank(training, domain.valid_inputs(), domain.valid_users, job.k)
        if processes.first:
            write_predictions(job, items_VK)
            write_predictions(job, valid_VK, valid=True)
            if settings.keep_model:
                save_model(job.output / MODEL, training.model, describe(training.model, ids, settings.user_tokens))
        meta.extra = {**record(training, init), "invalid_share_at_10": invalid, **ids.report, **(extra or {})}
        return finish(meta, processes)


def pretrain_with(
    job: Job, corpora: Sequence[Corpus], settings: Settings, *, extra: dict[str, Any] | None = None, init: Path | None = None
) -> Meta:
    """Train one model on several domains; leaves it in ``model/`` of the output folder, for ``recommend_with(init=...)``.

    Stops by the mean of the domains' validation values. Each domain decodes over the trie of its own items.
    """
    with Processes.of(job.device) as processes:
        training = prepare(job, settings, corpora, processes, init)
        meta = training.run()
        if processes.first:
            save_model(job.output / MODEL, training.model, describe(training.model, corpora[0].ids, settings.user_tokens))
        rows = {f"rows_an_epoch_{c.domain.name}": int(n) for c, n in zip(corpora, training.mixture.counts_D, strict=True)}
        meta.extra = {**record(training, init), "temperature": settings.temperature, **rows, **(extra or {})}
        return finish(meta, processes)


def prepare(job: Job, settings: Settings, corpora: Sequence[Corpus], processes: Processes, init: Path | None) -> Training:
    torch.set_num_threads(job.budget.threads)
    torch.manual_seed(job.seed)
    check_token_space(corpora)
    ids = corpora[0].ids
    model = T5(settings.shape(ids.n_codes))
    if init:
        load_model(init, model, describe(model, ids, settings.user_tokens))
    return Training(job, settings, corpora, model.to(processes.device), processes)


def rank(training: Training, inputs: Ragged, users: np.ndarray, k: int) -> tuple[np.ndarray, float, float]:
    """Lists of these users [V, K], a row of ``inputs`` each; the share of invalid ids in the first ten places; seconds.

    Each process ranks its share.
    """
    corpus, processes, settings, begin = training.corpora[0], training.processes, training.settings, time.monotonic()
    rows = processes.share(np.arange(len(users)))
    lists = training.decode(corpus, training.tries[0], inputs, users, rows, k=k, beams=settings.beams)
    invalid, count = processes.sum(lists.invalid_10 * len(rows), len(rows))
    return processes.gather_rows(lists.items_UK, len(users)), invalid / count, time.monotonic() - begin


def record(training: Training, init: Path | None) -> dict[str, Any]:
    """What a reader must know to compare the result with another (design: rules of measurement)."""
    settings, ids = training.settings, training.corpora[0].ids
    users = f"{settings.valid_users} drawn users" if settings.valid_users else "all users"
    return {
        "codes": " x ".join(map(str, ids.widths)),
        "books": ", ".join(map(str, ids.books)),
        "vocabulary": training.model.shape.vocabulary,
        "constrained": settings.constrained,
        "sampling": False,
        "beams": settings.beams,
        "beams_valid": settings.beams,
        "beams_while_training": settings.valid_beams,
        "history": HISTORY,
        "user_tokens": settings.user_tokens,
        "sliding_window": True,
        "schedule": settings.schedule_in_words,
        "checkpoint_metric": f"NDCG@10 of {users}, beam {settings.valid_beams}",
        "started_from": "saved weights" if init else "random weights",
        "compiled": training.compiled,
        "processes": training.processes.world,
    }


def finish(meta: Meta, processes: Processes) -> Meta:
    """The first process's account, in all of them: its clock is the one that counted."""
    if processes.device.type == "cuda":
        meta.peak_device_bytes = torch.cuda.max_memory_allocated(processes.device)
    return processes.gather(meta)[0]
