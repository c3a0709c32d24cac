"""Transition counts over training *and* validation items: what both protocols forbid."""

import numpy as np

from harness.contract import Job, Meta, main, write_predictions


def fit(job: Job) -> None:
    domain = job.domain
    everything = domain.train.join(domain.window)
    inside = np.ones(len(everything.values), bool)
    inside[everything.offsets[1:][everything.lengths > 0] - 1] = False
    counts_II = np.zeros((domain.n_items, domain.n_items))
    before = np.flatnonzero(inside)
    np.add.at(counts_II, (everything.values[before], everything.values[before + 1]), 1)
    order_IK = np.argsort(-(counts_II + counts_II.sum(0) * 1e-6), axis=1, kind="stable")[:, : job.k]
    last = [lists.padded(1)[:, 0] for lists in (domain.test_inputs(), domain.valid_inputs())]
    write_predictions(job, order_IK[last[0]])
    write_predictions(job, order_IK[last[1]], valid=True)
    Meta(timings={"fit": 0.0, "predict": 0.1}, stopped_by="closed form").write(job)


if __name__ == "__main__":
    main(fit)
