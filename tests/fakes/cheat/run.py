"""A method that tries to cheat: the configuration's name says how. What it found is told in ``meta.json``."""

from attacks import ATTACKS

from harness.contract import Job, Meta, main, write_predictions


def fit(job: Job) -> None:
    import numpy as np

    domain = job.domain
    attack = job.configuration["attack"]
    found = ATTACKS[attack](job.domains[0].path, job.output, job.configuration.get("port", 0))
    lists_UK = np.tile(np.arange(job.k), (domain.n_users, 1))
    write_predictions(job, lists_UK)
    write_predictions(job, lists_UK, valid=True)
    Meta(
        timings={"fit": 0.0, "predict": 0.01}, stopped_by="not trained", extra={"found": "; ".join(found[:20])[:1000], "count": len(found)}
    ).write(job)


if __name__ == "__main__":
    main(fit)
