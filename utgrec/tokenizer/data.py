"""Items of one or several domains as batches for the tokenizer.

In: domains, an encoder, settings. Out: ``Catalogue``: which items there are to learn from, and for a step the ``Batch`` of all
processes' shares, cut into parts that go through the model together.

An item is learnt from if it occurs in a training interaction; all domains' items are shuffled together, so that large domains have
more say (section 3.5). Each visit draws a neighbour of the item and masks of its text anew. Whatever is drawn follows from (seed,
epoch) or (seed, step), so that there is no state of a generator to keep.

Legend: X items of all domains together, B items of a share, R rows of a decoder, T text tokens, N selected tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.contract import ContractError, Domain
from utgrec.tokenizer.cooccurrence import Neighbours
from utgrec.tokenizer.encoder import Encoder, Prompt
from utgrec.tokenizer.masking import mask_tokens
from utgrec.tokenizer.model import Micro, PictureTargets, TextTargets
from utgrec.tokenizer.settings import Settings
from utgrec.tokenizer.vae import Moments

HELD_BYTES = 1 << 30
"""Prompts are kept once they are made while all of them are smaller than this; larger catalogues make them anew each time."""


@dataclass(frozen=True)
class Share:
    """What a process does in a step: its items, their neighbours and the masked texts of both."""

    items_B: np.ndarray
    """Rows of the catalogue."""
    neighbours_B: np.ndarray
    own: list[Masked]
    neighbour: list[Masked]
    pictured: np.ndarray
    pictured_neighbour: np.ndarray
    """Whether there is a picture to rebuild [B]."""
    step: int
    places_B: np.ndarray
    """In the whole step: what is drawn for an item does not depend on the process that does it."""

    @property
    def counts(self) -> dict[str, int]:
        """What the terms of the loss are means over."""
        return {
            "code": len(self.items_B),
            "text": sum(len(text.selected_N) for text in self.own),
            "text_neighbour": sum(len(text.selected_N) for text in self.neighbour),
            "noise": int(self.pictured.sum()),
            "noise_neighbour": int(self.pictured_neighbour.sum()),
        }


@dataclass(frozen=True)
class Masked:
    """A text with some of its tokens masked."""

    tokens_T: np.ndarray
    selected_N: np.ndarray
    targets_N: np.ndarray


class Catalogue:
    """The items of some domains, one after the other. ``moments``: what the VAE says of each domain's pictures."""

    def __init__(
        self,
        domains: Sequence[Domain],
        encoder: Encoder,
        settings: Settings,
        *,
        seed: int,
        moments: Sequence[Moments | None] = (),
        to_train: bool = True,
    ):
        """``to_train``: False for a catalogue that is only encoded, whose domains need no histories."""
        self.domains, self.encoder, self.settings, self.seed = tuple(domains), encoder, settings, seed
        self.moments = tuple(moments) or (None,) * len(self.domains)
        self.first_D = np.concatenate([[0], np.cumsum([domain.n_items for domain in self.domains])])
        if to_train:
            self._learn_from()
        self.lengths_X = np.zeros(len(self), np.int32)  # 0: not known yet
        self._prompts: dict[int, Prompt] = {}
        self._held = 0

    def _learn_from(self) -> None:
        self.neighbours = [Neighbours.of_training(domain.train, domain.n_items) for domain in self.domains]
        seen = [np.unique(domain.train.values) + first for domain, first in zip(self.domains, self.first_D, strict=False)]
        self.train_X = np.concatenate(seen) if seen else np.empty(0, np.int64)
        if not len(self.train_X):
            names = ", ".join(domain.name for domain in self.domains) or "none"
            raise ContractError(f"no item to train the tokenizer on: no training interaction in {names}")

    def __len__(self) -> int:
        return int(self.first_D[-1])

    # ------------------------------------------------------------------------------------------------ of single items

    def place(self, row: int) -> tuple[int, int]:
        """Domain and item number of a row."""
        domain = int(np.searchsorted(self.first_D, row, side="right")) - 1
        return domain, int(row - self.first_D[domain])

    @functools.cached_property
    def texts(self) -> list[str]:
        return [text for domain in self.domains for text in domain.texts]

    @functools.cached_property
    def text_tokens(self) -> list[np.ndarray]:
        """What the text decoder rebuilds of each item; empty for an item without text."""
        return self.encoder.text_tokens(self.texts)

    def picture(self, row: int) -> bytes | None:
        domain, item = self.place(row)
        return self.domains[domain].pictures[item]

    def prompts(self, rows: np.ndarray) -> list[Prompt]:
        missing = [int(row) for row in dict.fromkeys(rows.tolist()) if row not in self._prompts]
        made = dict(zip(missing, self._make(missing), strict=True)) if missing else {}
        if self._held < HELD_BYTES:
            self._prompts |= made
            self._held += sum(prompt.tokens_S.nbytes + getattr(prompt.patches_PC, "nbytes", 0) for prompt in made.values())
        return [made[row] if row in made else self._prompts[row] for row in rows.tolist()]

    def _make(self, rows: list[int]) -> list[Prompt]:
        return [self.encoder.prompt(*self._read(row)) for row in rows]

    def _read(self, row: int) -> tuple[np.ndarray, bytes | None]:
        """An ablation reads texts or pictures alone."""
        tokens_T = self.text_tokens[row] if self.settings.use_text else np.empty(0, np.int32)
        return tokens_T, self.picture(row) if self.settings.use_pictures else None

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Of the prompts, which are not made for it. A number is kept for every row: a picture's head is read once."""
        for row in np.unique(rows[self.lengths_X[rows] == 0]):
            held = self._prompts.get(int(row))
            self.lengths_X[row] = self.encoder.length(*self._read(int(row))) if held is None else len(held)
        return self.lengths_X[rows]

    # ------------------------------------------------------------------------------------------------------- of a step

    def epoch(self, epoch: int) -> np.ndarray:
        """The training items in the order of an epoch."""
        return np.random.default_rng([self.seed, 10, epoch]).permutation(self.train_X)

    def steps_per_epoch(self, batch: int) -> int:
        return -(-len(self.train_X) // batch)

    def step(self, step: int, batch: int, least: int = 1) -> np.ndarray:
        """The items of step 0, 1, 2, ...: of all processes together.

        ``least``: so many at the end of an epoch, too, with items from its beginning, so that every part of every process has one.
        """
        epoch, position = divmod(step, self.steps_per_epoch(batch))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, self.epoch(epoch)
        items = self._order[position * batch : (position + 1) * batch]
        return items if len(items) >= least else np.concatenate([items, np.resize(self._order, least - len(items))])

    def share(self, items: np.ndarray, step: int, mine: np.ndarray) -> Share:
        """``mine``: places in ``items`` of the step. What is drawn for an item does not depend on who does it."""
        drawn = np.random.default_rng([self.seed, 11, step])
        neighbours = np.empty_like(items)
        domain = np.searchsorted(self.first_D, items, side="right") - 1
        for number in np.unique(domain):
            here = domain == number
            neighbours[here] = self.neighbours[number].draw(items[here] - self.first_D[number], drawn) + self.first_D[number]
        own = [self._masked(int(items[place]), step, place, 0) for place in mine]
        rebuilt = self.settings.cooccurrence_weight > 0
        neighbour = [self._masked(int(neighbours[place]), step, place, 1) for place in mine] if rebuilt else []
        pictured, pictured_neighbour = (np.array([self.has_latents(row) for row in rows[mine]], bool) for rows in (items, neighbours))
        return Share(items[mine], neighbours[mine], own, neighbour, pictured, pictured_neighbour & rebuilt, step, mine)

    def has_latents(self, row: int) -> bool:
        """Whether the picture decoder has something to rebuild."""
        domain, item = self.place(row)
        moments = self.moments[domain]
        return moments is not None and item in moments

    def _masked(self, row: int, step: int, place: int, role: int) -> Masked:
        tokens_T = self.text_tokens[row] if self.settings.text_decoder else np.empty(0, np.int32)
        rng = np.random.default_rng([self.seed, 12, step, place, role])
        encoder = self.encoder
        masked_T, selected_T = mask_tokens(
            tokens_T, encoder.special_tokens, encoder.ordinary_tokens, encoder.mask_token, rng, self.settings.mask_tokens
        )
        selected_N = np.flatnonzero(selected_T)
        return Masked(masked_T, selected_N, tokens_T[selected_N])

    # -------------------------------------------------------------------------------------------------- parts of a share

    def parts(self, share: Share, count: int = 0) -> list[np.ndarray]:
        """Places in a share that go through the model together: items of like length, as many as settings allow.

        ``count``: so many parts, whatever their size (processes that must keep step).
        """
        lengths_B = np.maximum(self.lengths(share.items_B), self.lengths(share.neighbours_B))
        order_B = np.argsort(-lengths_B, kind="stable")
        return np.array_split(order_B, count or -(-len(order_B) // self.settings.tokenizer_micro))

    def micro(self, share: Share, places: np.ndarray) -> Micro:
        settings = self.settings
        rows = [share.items_B[places]]
        if settings.align_weight > 0:
            rows.append(share.neighbours_B[places])
        prompts = self.encoder.collate(self.prompts(np.concatenate(rows)))
        texts = [share.own[place] for place in places] + [share.neighbour[place] for place in places if share.neighbour]
        return Micro(
            prompts,
            len(places),
            text_targets(texts, len(places), self.encoder.mask_token) if settings.text_decoder else None,
            self.picture_targets(share, places),
        )

    def picture_targets(self, share: Share, places: np.ndarray) -> PictureTargets | None:
        """Latents of the pictures of these items, then of their neighbours: drawn from the posterior, flipped by chance."""
        sides = ((share.items_B, share.pictured), (share.neighbours_B, share.pictured_neighbour))
        found = [(role, number, place) for role, (_, has) in enumerate(sides) for number, place in enumerate(places) if has[place]]
        if not found:
            return None
        latents = []
        for role, _, place in found:
            domain, item = self.place(int(sides[role][0][place]))
            rng = np.random.default_rng([self.seed, 13, share.step, int(share.places_B[place]), role])
            latents.append(self.moments[domain].sample(item, rng))  # type: ignore[union-attr]
        own = sum(role == 0 for role, *_ in found)
        return PictureTargets(torch.tensor([number for _, number, _ in found]), torch.stack(latents), own)


def text_targets(texts: list[Masked], n_items: int, pad: int) -> TextTargets | None:
    """Texts side by side, filled up to the longest. Those of the items come first, then those of their neighbours."""
    longest = max(len(text.tokens_T) for text in texts)
    if not longest:
        return None
    tokens_RT = np.full((len(texts), longest), pad, np.int64)
    for row, text in enumerate(texts):
        tokens_RT[row, : len(text.tokens_T)] = text.tokens_T
    lengths_R = np.array([len(text.tokens_T) for text in texts])
    counts_R = np.array([len(text.selected_N) for text in texts])
    selected_N = np.concatenate([text.selected_N + row * longest for row, text in enumerate(texts)])
    return TextTargets(
        items_R=torch.arange(len(texts)) % n_items,
        masked_RT=torch.from_numpy(tokens_RT),
        keep_RT=torch.arange(longest) < torch.from_numpy(lengths_R)[:, None],
        selected_N=torch.from_numpy(selected_N),
        targets_N=torch.from_numpy(np.concatenate([text.targets_N for text in texts]).astype(np.int64)),
        n_own=int(counts_R[:n_items].sum()),
    )
