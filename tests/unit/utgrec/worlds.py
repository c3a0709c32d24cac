"""Simulated domains with their truth, tokenizers trained on them, and how much of what is planted their ids carry.

In: a seed, sizes, settings. Out: ``World`` (a domain, and for each of its items the planted groups: ``theme`` stands in texts only,
``colour`` in pictures only), a ``Training`` that is ready to run, ``carried``.

Legend: I items, L positions of an id.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import adjusted_mutual_info_score

from harness.contract import Domain
from harness.data.domain import read_private
from harness.data.simulate import simulate
from tests.unit.utgrec.small import TINY, job
from utgrec.recommender.processes import Processes
from utgrec.run import prepared, read_pictures, training_texts
from utgrec.tokenizer.data import Catalogue
from utgrec.tokenizer.encode import semantic_ids
from utgrec.tokenizer.encoder import make_encoder
from utgrec.tokenizer.model import UniversalTokenizer
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.train import Phase, Training

CPU = Processes(torch.device("cpu"))
SMALL: dict[str, Any] = TINY | {"root": 16, "leaf": 16, "code_width": 16, "text_tokens": 32}


@dataclass(frozen=True)
class World:
    domain: Domain
    theme_I: np.ndarray
    colour_I: np.ndarray

    @property
    def pictured_I(self) -> np.ndarray:
        return np.array([self.domain.pictures[item] is not None for item in range(self.domain.n_items)])

    @property
    def described_I(self) -> np.ndarray:
        return np.array([bool(text.strip()) for text in self.domain.texts])


@functools.cache
def worlds(seed: int, *categories: str, users: int, items: int) -> tuple[World, ...]:
    """They live as long as the process."""
    root = Path(tempfile.mkdtemp(prefix="utgrec-test-"))
    found = []
    for summary in simulate(root, seed=seed, categories=categories, users=users, items=items):
        groups = json.loads((summary.path / "private" / "planted.json").read_text())["items"]
        of = {name: np.array([groups[item][name] for item in read_private(summary.path).item_ids]) for name in ("theme", "colour")}
        found.append(World(Domain.read(summary.path / "public"), of["theme"], of["colour"]))
    return tuple(found)


def tokenizer(
    folder: Path,
    seed: int,
    of: Sequence[World],
    *,
    phase: Phase = "pretrain",
    start: UniversalTokenizer | None = None,
    vocabulary: Sequence[World] = (),
    **changes: Any,
) -> Training:
    """A training of a tokenizer on these worlds' domains, all of it from ``seed``.

    ``start``: a trained one that goes on from there. ``vocabulary``: whose texts a new one learns its tokens from; none: those of ``of``.
    """
    settings, domains = Settings.of(SMALL | changes), [world.domain for world in of]
    task = job(folder, "pretrain_tokenizer", dataclasses.asdict(settings), tuple(domains), seed=seed)
    torch.manual_seed(seed)
    moments, latents = read_pictures(task, settings, domains)
    model = start
    if model is None:
        texts = training_texts([world.domain for world in vocabulary or of])
        model = UniversalTokenizer(settings, make_encoder(settings, texts, seed=seed), latents)
    catalogue = prepared(task, settings, Catalogue(domains, model.encoder, settings, seed=seed, moments=moments))
    return Training(task, settings, catalogue, model, CPU, phase=phase, fresh=start is None)


def ids_of(training: Training, domain: int = 0) -> np.ndarray:
    """The semantic ids of a domain's items, as the recommender gets them. [I, L]"""
    return semantic_ids(training.model, training.catalogue, domain, CPU).codes_IL


def carried(codes_IL: np.ndarray, groups_I: np.ndarray) -> float:
    """How much of the groups the codes tell: mutual information, adjusted so that chance is 0 and all is 1; mean over positions."""
    return float(np.mean([adjusted_mutual_info_score(groups_I, codes_I) for codes_I in codes_IL.T]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean."""
    middle, width = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(middle - width), float(middle + width)
