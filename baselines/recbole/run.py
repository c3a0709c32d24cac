"""RecBole's sequential models under this benchmark's rules: a TOML section is a model.

Stages: ``fit`` trains and predicts; ``pretrain_s3`` is the self-supervised part of S3-Rec and leaves its weights.
RecBole gives the model, the dataset, the batches and the training step; what is trained on, when it stops and what is
written follows the contract.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from harness.contract import Domain, Job, Meta, Ragged, main, ndcg_at_10, skip, write_predictions


def start(job: Job, domain: Domain, **more: Any) -> tuple[Any, Any, Any]:
    """RecBole's config, trainer (with the model) and batches for a job."""
    torch.set_num_threads(job.budget.threads)
    import library  # first: it mends numpy for RecBole
    from models import UnseenSampler, find_model
    from recbole.data.dataloader import TrainDataLoader
    from recbole.sampler import RepeatableSampler
    from recbole.trainer import Trainer

    if job.configuration.get("feature_tokens") and not any(domain.texts):
        skip(job, "this model needs item text, and the domain has none")
    if not len(domain.training_rows()[1]):
        skip(job, "the domain has no training row: no user has two items in the training part")
    model_class = find_model(job.configuration["model"])
    config = library.make_config(job, model_class, domain=domain, **more)
    rows = "sequences" if more.get("train_stage") == "pretrain" else job.configuration.get("rows", "prefixes")
    dataset = library.make_dataset(config, domain, rows)
    if config["train_neg_sample_args"]["distribution"] == "none":
        sampler = None
    elif job.configuration.get("negatives") == "unseen":
        sampler = UnseenSampler(domain.train, domain.n_items)
    else:
        sampler = RepeatableSampler(["train"], dataset).set_phase("train")
    loader = TrainDataLoader(config, dataset, sampler, shuffle=True)  # before the model: it names fields that BERT4Rec reads
    return config, Trainer(config, model_class(config, dataset).to(config["device"])), loader


def fit(job: Job) -> None:
    domain = job.domain
    more = {}
    if job.configuration["model"] == "S3Rec":
        more = {"train_stage": "finetune", "pre_model_path": str(job.inputs["pretrain_s3"] / "pretrained.pth")}
    config, trainer, loader = start(job, domain, **more)
    import library
    import numpy as np
    from train import fit_epochs, rank

    def part(users: np.ndarray, inputs: Ragged) -> tuple[Ragged, Any]:
        """The inputs, and those that are not empty in RecBole's form: these models need an item."""
        return inputs, library.interaction(config, inputs.filled(), users=users[inputs.lengths > 0])

    def lists(rows: tuple[Ragged, Any], k: int) -> np.ndarray:
        inputs, batch = rows
        return domain.lists(inputs, k, lambda: rank(trainer.model, batch, domain.n_items, k))

    valid_rows, test_rows = part(domain.valid_users, domain.valid_inputs()), part(domain.test_users, domain.test_inputs())

    def validate() -> float:
        return ndcg_at_10(lists(valid_rows, 10), domain.valid)

    epochs, every = job.configuration["epochs"], job.configuration.get("eval_every", 1)
    fitted = fit_epochs(job, trainer, loader, epochs, every, validate)

    begin = time.monotonic()
    items_UK = lists(test_rows, job.k)
    predicted = time.monotonic() - begin
    write_predictions(job, items_UK)
    write_predictions(job, lists(valid_rows, job.k), valid=True)
    write_meta(job, trainer, fitted, predict=predicted)


def pretrain_s3(job: Job) -> None:
    """S3-Rec, first stage: attributes, items and segments are masked and predicted from the training part alone."""
    _, trainer, loader = start(job, job.domain, train_stage="pretrain")
    from train import fit_epochs

    fitted = fit_epochs(job, trainer, loader, job.configuration["pretrain_epochs"], 1, None)
    torch.save({"state_dict": {name: value.cpu() for name, value in trainer.model.state_dict().items()}}, job.output / "pretrained.pth")
    write_meta(job, trainer, fitted)


def write_meta(job: Job, trainer: Any, fitted: Any, **timings: float) -> None:
    Meta(
        timings={"fit": fitted.spent, **timings},
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        steps=fitted.steps,
        epochs=fitted.epochs,
        peak_device_bytes=torch.cuda.max_memory_allocated() if job.device == "cuda" else None,
        precision=job.precision,
        **fitted.stopping.meta,
    ).write(job)


if __name__ == "__main__":
    main(lambda job: {"fit": fit, "pretrain_s3": pretrain_s3}[job.stage](job))
