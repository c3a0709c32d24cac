"""Popularity: every user gets the items with the most interactions in the training part.

In: one domain. Out: one list of K items, repeated for all users. Ties go to the smaller item number.

Legend: U tested users, V validated users (under loo-v1 both are everybody), I items, K list length.
"""

import time

import numpy as np

from harness.contract import Job, Meta, main, ndcg_at_10, write_predictions


def fit(job: Job) -> None:
    domain = job.domain
    start = time.perf_counter()
    list_K = domain.popular(job.k)
    fitted = time.perf_counter()
    items_UK = np.broadcast_to(list_K, (len(domain.test_users), job.k))
    predicted = time.perf_counter()
    items_VK = np.broadcast_to(list_K, (len(domain.valid_users), job.k))

    write_predictions(job, items_UK)
    write_predictions(job, items_VK, valid=True)
    Meta(
        timings={"fit": fitted - start, "predict": predicted - fitted},
        parameters=domain.n_items,
        best_valid=ndcg_at_10(items_VK, domain.valid),
        stopped_by="closed form",
    ).write(job)


if __name__ == "__main__":
    main(fit)
