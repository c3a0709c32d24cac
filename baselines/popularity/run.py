"""Popularity: every user gets the items with the most interactions in the training part.

In: one domain. Out: one list of K items, repeated for all users. Ties go to the smaller item number.

Legend: U users, I items, K list length.
"""

import time

import numpy as np

from harness.contract import Job, Meta, main, ndcg_at_10, write_predictions


def fit(job: Job) -> None:
    domain = job.domain
    start = time.perf_counter()
    count_I = np.bincount(domain.train.values, minlength=domain.n_items)
    order_I = np.argsort(-count_I, kind="stable")  # stable: the smaller number first among equals
    fitted = time.perf_counter()

    list_K = np.full(job.k, -1, np.int32)  # a catalogue smaller than K leaves spent slots
    list_K[: min(job.k, domain.n_items)] = order_I[: job.k]
    items_UK = np.broadcast_to(list_K, (domain.n_users, job.k))
    predicted = time.perf_counter()

    write_predictions(job, items_UK)
    write_predictions(job, items_UK, valid=True)
    Meta(
        timings={"fit": fitted - start, "predict": predicted - fitted},
        parameters=domain.n_items,
        best_valid=ndcg_at_10(items_UK, domain.valid),
        stopped_by="closed form",
    ).write(job)


if __name__ == "__main__":
    main(fit)
