"""TIGER: semantic ids from item texts, then a T5 that writes the ids of the next item. Rajput et al., NeurIPS 2023, arXiv 2305.05065.

Stages: ``tokenize`` makes the ids of a domain (tokenizer.py); ``fit`` trains the recommender that all generative methods share
(utgrec/recommender) on them and predicts. With ``codes = "codes_..."`` the ids are a column that the domain brings along, and
``fit`` is the only stage.
"""

from __future__ import annotations

import dataclasses

from baselines.tiger import tokenizer
from harness.contract import Job, main, skip
from utgrec.configuration import refuse
from utgrec.recommender.run import recommend_with
from utgrec.recommender.settings import Settings
from utgrec.semantic_ids import SemanticIds

IDS = "ids.npz"


def tokenize(job: Job) -> None:
    settings, rest = tokenizer.Settings.take(job.configuration)
    refuse(rest, tokenizer.KEYS)
    ids, meta = tokenizer.tokenise(job, settings)
    ids.save(job.output / IDS)
    meta.write(job)


def fit(job: Job) -> None:
    settings, rest = Settings.take(job.configuration)
    column = rest.pop("codes", "")
    _, rest = tokenizer.Settings.take(rest)
    refuse(rest, ("codes", *Settings.keys(), *tokenizer.KEYS))
    if column:
        if column not in (present := [name for name in job.domain.items.column_names if name.startswith("codes_")]):
            skip(job, f"the domain brings no ids {column!r}; it has {', '.join(present) or 'none'}")
        ids = SemanticIds.imported(job.domain, column)
    else:
        ids = SemanticIds.load(job.inputs["tokenize"] / IDS)
        # The budget is the run's: what the tokenizer has trained is not there any more for the recommender.
        left = job.budget.seconds - float(ids.report["tokenizer_seconds"])
        job = dataclasses.replace(job, budget=dataclasses.replace(job.budget, seconds=left))
    recommend_with(job, ids, settings).write(job)


if __name__ == "__main__":
    main(lambda job: {"tokenize": tokenize, "fit": fit}[job.stage](job))
