"""Last item: what most often came directly after the last item of the input, in the training part.

In: one domain. Out: for each user the successors of the last item by (count, popularity, smaller item number); the
rest of the list is filled with the most popular items that are not in it yet. The history is not masked. Who has no
last item (under time-v1) gets the most popular items.

Legend: U tested users, V validated users (under loo-v1 both are everybody), I items, K list length, P distinct adjacent pairs,
N candidates for filling.
"""

import time

import numpy as np

from harness.contract import Domain, Job, Meta, Ragged, main, ndcg_at_10, write_predictions


def successors(domain: Domain, k: int) -> np.ndarray:
    """The list [I, K] that follows each item; -1 where the catalogue is smaller than K."""
    n_items, values = domain.n_items, domain.train.values.astype(np.int64)
    order_I = domain.by_popularity
    place_I = np.empty(n_items, np.int64)  # place in the popularity order: a smaller place wins, ties included
    place_I[order_I] = np.arange(n_items)

    user_of = np.repeat(np.arange(len(domain.train)), domain.train.lengths)
    adjacent = user_of[1:] == user_of[:-1]  # a pair never crosses two users
    pair_P, count_P = np.unique(values[:-1][adjacent] * n_items + values[1:][adjacent], return_counts=True)
    from_P, to_P = np.divmod(pair_P, n_items)
    best_first = np.lexsort((place_I[to_P], -count_P, from_P))
    ranked = Ragged(to_P[best_first], np.concatenate([[0], np.cumsum(np.bincount(from_P, minlength=n_items))]))

    items_IK = np.full((n_items, k), -1, np.int32)
    column_P = np.arange(len(ranked.values)) - np.repeat(ranked.offsets[:-1], ranked.lengths)
    shown_P = column_P < k
    from_P, column_P, to_P = from_P[best_first][shown_P], column_P[shown_P], ranked.values[shown_P]
    items_IK[from_P, column_P] = to_P

    # At most K of the 2K most popular items are in a list already, so these are enough to fill every list.
    filler_N = order_I[: 2 * k]
    free_IN = np.ones((n_items, len(filler_N)), bool)
    popular_P = place_I[to_P] < len(filler_N)
    free_IN[from_P[popular_P], place_I[to_P[popular_P]]] = False
    slot_IN = np.minimum(ranked.lengths, k)[:, None] + np.cumsum(free_IN, axis=1, dtype=np.int32) - 1
    row, column = np.nonzero(free_IN & (slot_IN < k))
    items_IK[row, slot_IN[row, column]] = filler_N[column]
    return items_IK


def last_of(inputs: Ragged) -> np.ndarray:
    """The last item of every input; -1 for an empty one."""
    return inputs.padded(1)[:, 0]


def fit(job: Job) -> None:
    domain = job.domain
    start = time.perf_counter()
    items_IK = successors(domain, job.k)
    after_IK = np.vstack([items_IK, domain.popular(job.k)])  # the row -1 is for those without a last item
    fitted = time.perf_counter()
    test_UK = after_IK[last_of(domain.test_inputs())]
    predicted = time.perf_counter()
    valid_VK = after_IK[last_of(domain.valid_inputs())]

    write_predictions(job, test_UK)
    write_predictions(job, valid_VK, valid=True)
    Meta(
        timings={"fit": fitted - start, "predict": predicted - fitted},
        parameters=int(items_IK.size),
        best_valid=ndcg_at_10(valid_VK, domain.valid),
        stopped_by="closed form",
    ).write(job)


if __name__ == "__main__":
    main(fit)
