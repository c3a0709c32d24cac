"""Template: popularity plus what follows the last item, blended. Change everything between the lines of dashes.

In: a job (``python run.py job.json``) with one domain. Out: predictions.npz, valid_predictions.npz, meta.json.
Shape legend: U users, B batch of users, I items, K list length.
"""

import time

import numpy as np

from harness.contract import Domain, Job, Meta, Progress, Ragged, Stopping, main, ndcg_at_10, write_predictions

# ------------------------------------------------------------------------------------------------------- your model


class Model:
    """Counts in the training part. ``weight`` is the one thing that is tuned."""

    def __init__(self, domain: Domain):
        self.n_items, self.weight = domain.n_items, 0.0
        count_I = np.bincount(domain.train.values, minlength=domain.n_items)
        self.popularity_I = count_I / count_I.sum()
        self.follows: dict[int, dict[int, int]] = {}
        for history, item in zip(*domain.training_rows(history=1), strict=True):
            counts = self.follows.setdefault(int(history[-1]), {})
            counts[int(item)] = counts.get(int(item), 0) + 1

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Scores [B, I] of all items; a history is a user's last items (up to 20), oldest first."""
        scores_BI = np.tile(self.popularity_I, (len(histories), 1))
        for scores_I, history in zip(scores_BI, histories, strict=True):
            counts = self.follows.get(int(history[-1]), {})
            total = sum(counts.values())
            for item, count in counts.items():
                scores_I[item] += self.weight * count / total
        return scores_BI


# ------------------------------------------------------------------------------------------------------------------


def rank(model: Model, inputs: Ragged, k: int) -> np.ndarray:
    """The K best items of every user [U, K], best first. Equal scores: the smaller item number."""
    kept, lists = min(k, model.n_items), []
    for start in range(0, len(inputs), 512):
        scores_BI = model.scores([inputs[user] for user in range(start, min(start + 512, len(inputs)))])
        best_BK = np.sort(np.argpartition(-scores_BI, kept - 1, axis=1)[:, :kept], axis=1)
        order_BK = np.argsort(-np.take_along_axis(scores_BI, best_BK, axis=1), axis=1, kind="stable")
        lists.append(np.take_along_axis(best_BK, order_BK, axis=1))
    return np.pad(np.concatenate(lists), ((0, 0), (0, k - kept)), constant_values=-1)


def fit(job: Job) -> None:
    # Take every random number from job.seed (here nothing is random). Write only below job.output, .cache and .scratch.
    domain, weights = job.domain, job.configuration["weights"]
    start = time.perf_counter()
    model, best = Model(domain), 0.0
    stopping, progress = Stopping(job), Progress(job)  # patience and budget; live curves
    for step, weight in enumerate(weights, 1):  # your training loop
        model.weight = weight
        value = ndcg_at_10(rank(model, domain.valid_inputs(), 10), domain.valid)
        progress.log(step, of=len(weights), valid_ndcg_at_10=value)
        if stopping.improved(value):
            best = weight  # keep your best weights here
        if stopping.stop:
            break
    model.weight = best
    fitted = time.perf_counter()

    items_UK = rank(model, domain.test_inputs(), job.k)
    predicted = time.perf_counter()
    write_predictions(job, items_UK)
    write_predictions(job, rank(model, domain.valid_inputs(), job.k), valid=True)
    Meta(timings={"fit": fitted - start, "predict": predicted - fitted}, extra={"weight": best}, **stopping.meta).write(job)


if __name__ == "__main__":
    main(fit)
