"""The domains a recommender learns from, one or several: their rows, and which of them an epoch has, in which order.

In: domains with their semantic ids. Out: row numbers an epoch, and the token batches of rows.

Several domains are mixed by temperature (Devlin et al., multilingual BERT, and Raffel et al., T5, section 3.5.2): a domain of n
rows gets a share of n^(1/T) of an epoch, and an epoch has as many rows as all domains together. Nothing is drawn with
replacement: each domain is an endless stream of permutations of its rows, an epoch takes the next part of it, and so every
row of a domain is used as often as any other, give or take one. With T = 1 that is every row once. The order follows from
(seed, epoch) alone, so that a training can go on anywhere.

All domains need one token space: the same number of codes of the same widths and books. Each keeps its own ids, and with
them its own trie; what a tuple means in another domain does not matter.

Legend: R rows of all domains together, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.contract import ContractError, Domain, Ragged
from utgrec.recommender.data import Batch, Histories, stairs
from utgrec.recommender.fused import Layout
from utgrec.semantic_ids import SemanticIds


@dataclass(frozen=True)
class Corpus:
    """A domain and the ids of its items."""

    domain: Domain
    ids: SemanticIds

    def __post_init__(self) -> None:
        domain = self.domain
        if self.ids.n_items != domain.n_items:
            raise ContractError(
                f"{domain.path}: {domain.name} has {domain.n_items} items, these semantic ids are of {self.ids.n_items}; "
                "make them from this domain"
            )
        if (domain.train.lengths < 2).all():
            raise ContractError(
                f"{domain.path / 'users.parquet'}: {domain.name} has no training rows, no user has two training items; "
                "use a domain with longer histories"
            )

    def histories(self, inputs: Ragged, users: np.ndarray, rows: np.ndarray, user_tokens: int) -> Histories:
        """What the decoder reads in these rows of ``inputs``, of which row v is that of user ``users[v]``."""
        return Histories(inputs.take(rows), self.ids, users[rows], user_tokens=user_tokens)


class Mixture:
    def __init__(self, corpora: Sequence[Corpus], *, user_tokens: int, temperature: float, batch: int, seed: int):
        check_token_space(corpora)
        self.parts = [Histories.training(corpus.domain, corpus.ids, user_tokens=user_tokens) for corpus in corpora]
        self.sizes_D = np.array([len(part) for part in self.parts])
        self.ends_D = np.cumsum(self.sizes_D)  # domain d has the rows ends[d] - sizes[d] ... ends[d] - 1
        self.counts_D = mixed_counts(self.sizes_D, temperature)
        self.batch, self.seed = batch, seed
        self.steps_per_epoch = -(-int(self.counts_D.sum()) // batch)
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> np.ndarray:
        """The rows of step 0, 1, 2, ...: of all processes together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self.order(epoch)
        return self._rows[position * self.batch : (position + 1) * self.batch]

    def order(self, epoch: int) -> np.ndarray:
        """All rows of an epoch, shuffled over the domains."""
        parts = [self._stream(domain, epoch * count, count) for domain, count in enumerate(self.counts_D)]
        return np.random.default_rng([self.seed, 0, epoch]).permutation(np.concatenate(parts))

    def _stream(self, domain: int, start: int, count: int) -> np.ndarray:
        """Places start ... start + count - 1 of a domain's stream: one permutation of its rows after the other."""
        size = self.sizes_D[domain]
        first, last = start // size, -(-(start + count) // size)
        passes = [np.random.default_rng([self.seed, 1, domain, i]).permutation(size) for i in range(first, last)]
        return self.ends_D[domain] - size + np.concatenate([np.empty(0, np.int64), *passes])[start - first * size :][:count]

    def layout(self, size: int) -> Layout:
        """One layout that nearly every ``size`` rows of an epoch fit into, with little padding: for compiled programs."""
        lengths_R = np.concatenate([part.lengths for part in self.parts])
        return stairs(lengths_R[self.order(0)], size)

    def tokens(self, rows: np.ndarray) -> Batch:
        if len(self.parts) == 1:
            return self.parts[0].batch(rows)
        domain = np.searchsorted(self.ends_D, rows, side="right")
        firsts = self.ends_D - self.sizes_D
        return Batch.join([self.parts[d].batch(rows[domain == d] - firsts[d]) for d in np.unique(domain)])


def mixed_counts(sizes_D: np.ndarray, temperature: float) -> np.ndarray:
    """Rows of each domain in an epoch: in proportion to n^(1/T), the remainders to the largest fractions."""
    share_D = (sizes_D / sizes_D.max()) ** (1 / temperature)
    exact_D = sizes_D.sum() * share_D / share_D.sum()
    counts_D = np.floor(exact_D).astype(np.int64)
    rest = int(sizes_D.sum() - counts_D.sum())
    counts_D[np.argsort(counts_D - exact_D, kind="stable")[:rest]] += 1
    return counts_D


def check_token_space(corpora: Sequence[Corpus]) -> None:
    if not corpora:
        raise ContractError("no domain to train on; the job names none")
    first = corpora[0]
    for other in corpora[1:]:
        here, there = (list(zip(c.ids.widths, c.ids.books, strict=True)) for c in (first, other))
        if here != there:
            raise ContractError(
                f"domains {first.domain.name} and {other.domain.name} have different token spaces: (width, book) of each position is "
                f"{here} and {there}; make their ids with one tokenizer, an extra digit as wide in both"
            )
