"""Writes valid output at once."""

import numpy as np

from harness.contract import Job, Meta, main, write_predictions


def fit(job: Job) -> None:
    lists_UK = np.tile(np.arange(job.k), (job.domain.n_users, 1))
    write_predictions(job, lists_UK)
    write_predictions(job, lists_UK, valid=True)
    Meta(timings={"fit": 0.0, "predict": 0.0}, stopped_by="not trained").write(job)


if __name__ == "__main__":
    main(fit)
