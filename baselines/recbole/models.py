"""The models: RecBole's own classes, and three of them with a mend.

``recbole_name`` names the class whose defaults apply. Shape legend: B batch, L history length, I items incl. padding.
"""

from __future__ import annotations

import importlib

import library  # noqa: F401  (first: it mends numpy for RecBole)
import numpy as np
import torch
from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from harness.contract import ContractError, Ragged

PLAIN = {
    "SASRec": "sasrec", "GRU4Rec": "gru4rec", "HGN": "hgn", "Caser": "caser", "NARM": "narm", "LightSANs": "lightsans",
    "CORE": "core", "FDSA": "fdsa", "S3Rec": "s3rec",
}  # fmt: skip
"""Models used as they are, and their modules. Every other sequential model of RecBole that needs nothing else fits here."""


class SASRecBCE(RecBoleSASRec):
    """SASRec with the loss of its paper (Kang and McAuley 2018, section 3.5): at each position binary cross-entropy of
    the true next item against one sampled item. RecBole has BPR and CE only.

    The paper sums over the positions of a sequence; RecBole makes each position a row of its own, with the prefix as
    input. Causal attention gives position i the same representation either way, so the sum over rows is the sum over
    positions; only what stands together in a batch differs. Negatives: see UnseenSampler.
    """

    recbole_name = "SASRec"
    input_type = InputType.PAIRWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.loss_fct = PairBCE()


class PairBCE(nn.Module):
    """-log sigmoid(positive) - log(1 - sigmoid(negative)), the mean over rows."""

    def forward(self, positive_B, negative_B):
        return (F.softplus(-positive_B) + F.softplus(negative_B)).mean()


class BERT4Rec(RecBoleBERT4Rec):
    """BERT4Rec with three mends at its edges; the network is RecBole's.

    RecBole puts the mask after the history and then always cuts the first item off, even from a history of one item,
    which leaves nothing to predict from; here it is cut only when the history is full. Its loop over users is a
    scatter here. A batch in which no position is masked divides 0 by 0 there.
    """

    recbole_name = "BERT4Rec"

    def full_sort_predict(self, interaction):
        items_BL, length_B = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        full_B = length_B == items_BL.size(1)
        items_BL = torch.where(full_B[:, None], items_BL.roll(-1, dims=1), items_BL)
        place_B = torch.where(full_B, length_B - 1, length_B)
        items_BL = items_BL.scatter(1, place_B[:, None], self.mask_token)
        output_BH = self.gather_indexes(self.forward(items_BL), place_B)
        return output_BH @ self.item_embedding.weight[: self.n_items].T + self.output_bias

    def calculate_loss(self, interaction):
        if not (interaction[self.MASK_INDEX] > 0).any():
            return self.output_bias.sum() * 0
        return super().calculate_loss(interaction)


def find_model(name: str) -> type:
    """The class for ``model = NAME`` of a configuration."""
    if name == "SASRecBCE":
        return SASRecBCE
    if name == "BERT4Rec":
        return BERT4Rec
    if name not in PLAIN:
        raise ContractError(f"model = {name!r}: known are {', '.join(sorted([*PLAIN, 'SASRecBCE', 'BERT4Rec']))}")
    found = getattr(importlib.import_module(f"recbole.model.sequential_recommender.{PLAIN[name]}"), name)
    found.recbole_name = name
    return found


class UnseenSampler:
    """The negatives of SASRec's paper: uniform over the items that the user has nowhere in the training part.

    (RecBole's own sampler for sequential models, which stays in use for BPR, leaves out the target of the row only.)
    """

    def __init__(self, train: Ragged, n_items: int):
        self.n_items = n_items
        owners = np.repeat(np.arange(len(train)), train.lengths) + 1  # internal ids: number + 1
        self._seen = np.unique(owners * (n_items + 1) + train.values + 1)

    def sample_by_user_ids(self, users: np.ndarray, targets: np.ndarray, num: int) -> torch.Tensor:
        """``num`` negatives a row, as internal ids. A user who has nearly everything keeps what the last draw gave."""
        users = np.tile(users, num)
        drawn = np.random.randint(1, self.n_items + 1, len(users))  # noqa: NPY002 (the generator that RecBole seeds)
        redo = np.arange(len(users))
        for _ in range(100):
            key = users[redo] * (self.n_items + 1) + drawn[redo]
            place = np.searchsorted(self._seen, key)
            redo = redo[self._seen[np.minimum(place, len(self._seen) - 1)] == key]
            if not len(redo):
                break
            drawn[redo] = np.random.randint(1, self.n_items + 1, len(redo))  # noqa: NPY002
        return torch.from_numpy(drawn)
