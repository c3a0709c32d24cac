"""LETTER: TIGER with a tokenizer that knows who bought what together. Wang et al., CIKM 2024, arXiv 2405.07314.

Stages: ``collaborate`` trains a SASRec on the training part and leaves its item vectors (sasrec.py); ``tokenize`` trains the RQ-VAE
with both regularisers (letter.py) in TIGER's frame; ``fit`` trains the recommender that all generative methods share
(utgrec/recommender) and predicts. Without alignment there is no first stage.

The budget is the run's: each stage gets what the stages before it have left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baselines.letter import letter, sasrec
from baselines.tiger import rqvae, tokenizer
from baselines.tiger.run import IDS
from harness.contract import ContractError, Job, main, skip
from utgrec.configuration import refuse
from utgrec.recommender.run import recommend_with
from utgrec.recommender.settings import Settings as RecommenderSettings
from utgrec.semantic_ids import NearestLast, SemanticIds

VECTORS = "collaborative.npz"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Keys of a configuration, apart from those of TIGER's tokenizer and of the recommender."""

    collaborate_share: float = 0.2
    """Share of the budget's seconds that SASRec may take."""
    repair: str = "digit"
    """Of colliding ids: ``digit``, one code more (TIGER), or ``nearest``, another last code; the length stays (published)."""
    letter: letter.Settings = dataclasses.field(default_factory=letter.Settings)
    sasrec: sasrec.Settings = dataclasses.field(default_factory=sasrec.Settings)
    tokenizer: tokenizer.Settings = dataclasses.field(default_factory=tokenizer.Settings)

    @classmethod
    def take(cls, configuration: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """The settings in a configuration, and the keys that are left: the recommender's."""
        ids, rest = tokenizer.Settings.take(configuration)
        regularisers = letter.Settings(**_taken(rest, {key: key for key in LETTER_KEYS}, letter.Settings))
        collaborative = sasrec.Settings(width=ids.vae.latent, **_taken(rest, SASREC_KEYS, sasrec.Settings))
        own = _taken(rest, {key: key for key in OWN_KEYS}, cls)
        settings = cls(**own, letter=regularisers, sasrec=collaborative, tokenizer=ids)
        if settings.repair not in ("digit", "nearest"):
            raise ContractError(f"repair = {settings.repair!r}: use 'digit' or 'nearest'")
        if not 0 <= settings.collaborate_share <= 1:
            raise ContractError(f"collaborate_share = {settings.collaborate_share}: use a share from 0 to 1")
        if ids.quantiser != "rqvae":
            raise ContractError(f"quantiser = {ids.quantiser!r}: the regularisers are terms of an RQ-VAE's loss; use 'rqvae'")
        return settings, rest


def _taken(rest: dict[str, Any], names: Mapping[str, str], kind: type) -> dict[str, Any]:
    """Take keys out of a configuration, as fields of ``kind``: field by key, of the type of its default."""
    return {name: tokenizer.checked(key, rest.pop(key), getattr(kind, name)) for key, name in names.items() if key in rest}


LETTER_KEYS = tuple(entry.name for entry in dataclasses.fields(letter.Settings))
SASREC_KEYS = {f"sasrec_{entry.name}": entry.name for entry in dataclasses.fields(sasrec.Settings) if entry.name != "width"}
OWN_KEYS = ("collaborate_share", "repair")
STAGE_KEYS = {
    "collaborate": ("collaborate_share", "vae_latent", *SASREC_KEYS),
    "tokenize": (*tokenizer.KEYS, *LETTER_KEYS, "repair"),
}
"""What decides the outcome of a stage: its ``uses`` in method.toml."""


def collaborate(job: Job) -> None:
    settings = settings_of(job)
    torch.set_num_threads(job.budget.threads)
    if not len(job.domain.training_rows()[1]):
        skip(job, "the domain has no training row: no user has two items in the training part, and SASRec has nothing to learn from")
    vectors_ID, seen_I, meta = sasrec.item_vectors(with_seconds(job, settings.collaborate_share * job.budget.seconds), settings.sasrec)
    with open(job.output / VECTORS, "wb") as file:
        np.savez(file, vectors=vectors_ID, seen=seen_I, seconds=meta.timings["fit"], valid=meta.best_valid)
    length_T = np.linalg.norm(vectors_ID[seen_I], axis=1)
    meta.extra = {"items_without_collaborative_vector": int((~seen_I).sum()), "collaborative_vector_length": float(length_T.mean())}
    meta.write(job)


def tokenize(job: Job) -> None:
    settings = settings_of(job)
    about: dict[str, Any] = {"alignment": settings.letter.alignment, "diversity": settings.letter.diversity}
    vectors_ID, seconds = None, 0.0
    if settings.letter.alignment:
        if "collaborate" not in job.inputs:
            raise ContractError(f"alignment = {settings.letter.alignment}: it needs the stage 'collaborate'; add it, or set alignment to 0")
        vectors_ID, seen_I, seconds, valid = read_vectors(job.inputs["collaborate"] / VECTORS)
        about |= {"items_without_collaborative_vector": int((~seen_I).sum()), "sasrec_best_valid": valid, "sasrec_seconds": seconds}

    def make_model(width: int, vae: rqvae.Settings, items_T: torch.Tensor) -> rqvae.RQVAE:
        vectors_TZ = None if vectors_ID is None else torch.from_numpy(vectors_ID)[items_T.cpu()]
        return letter.LETTER(width, vae, settings.letter, vectors_TZ, job.seed)

    repair = nearest_last if settings.repair == "nearest" else None
    ids, meta = tokenizer.tokenise(with_seconds(job, job.budget.seconds - seconds), settings.tokenizer, make_model, repair)
    if vectors_ID is not None:
        about |= letter.collaborative_similarity(ids.codes_IL[seen_I, : settings.tokenizer.levels], vectors_ID[seen_I])
    meta.extra = {**meta.extra, **about}
    dataclasses.replace(ids, report=meta.extra).save(job.output / IDS)
    meta.write(job)


def fit(job: Job) -> None:
    _, rest = Settings.take(job.configuration)
    settings, rest = RecommenderSettings.take(rest)
    refuse(rest, (*RecommenderSettings.keys(), *OWN_KEYS, *LETTER_KEYS, *SASREC_KEYS, *tokenizer.KEYS))
    ids = SemanticIds.load(job.inputs["tokenize"] / IDS)
    spent = float(ids.report["tokenizer_seconds"]) + float(ids.report.get("sasrec_seconds", 0.0))
    recommend_with(with_seconds(job, job.budget.seconds - spent), ids, settings).write(job)


def settings_of(job: Job) -> Settings:
    """Of a stage before the last, which is given the keys that it uses and no others."""
    settings, rest = Settings.take(job.configuration)
    refuse(rest, STAGE_KEYS[job.stage])
    return settings


def with_seconds(job: Job, seconds: float) -> Job:
    return dataclasses.replace(job, budget=dataclasses.replace(job.budget, seconds=seconds))


def read_vectors(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    with np.load(path, allow_pickle=False) as archive:
        return archive["vectors"], archive["seen"], float(archive["seconds"]), float(archive["valid"])


def nearest_last(raw: SemanticIds, quantised_IZ: torch.Tensor, books_LKZ: torch.Tensor) -> SemanticIds:
    """Free ids by distance: what each level had to code, against the rows of its codebook."""
    left_IZ, vectors = quantised_IZ.cpu().numpy().astype(np.float64), []
    books = books_LKZ.cpu().numpy().astype(np.float64)
    for book_KZ, codes_I in zip(books, raw.codes_IL.T, strict=True):
        vectors.append(left_IZ)
        left_IZ = left_IZ - book_KZ[codes_I]
    return NearestLast.of(vectors, list(books)).repair(raw)


if __name__ == "__main__":
    main(lambda job: {"collaborate": collaborate, "tokenize": tokenize, "fit": fit}[job.stage](job))
