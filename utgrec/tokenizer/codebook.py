"""Tree-structured codebooks (UTGRec section 3.2): L continuous vectors of an item become L codes.

In: h [B, L, D], the vectors of an item, one a position. Out: codes [B, L], the vectors r that the decoders read, the code loss.

    t_1 = h_1,  t_l = h_l - h_(l-1)          prefix residual: of the continuous vectors, never of chosen codes
    c_l = argmin_j |t_l - C_l[j]|^2           C_1 is the root's book; all other positions share the leaves' book
    r_l = C_1[c_1] + ... + C_l[c_l]           what is decoded; straight through, so that d r_l / d h_l is the identity
    L_Code = mean over books of  |C[c] - sg(t)|^2 + beta |t - sg(C[c])|^2    (means over elements)

"Tree": the root decides first, and what is below it is coded relative to it. Without ``tree`` each position has its own book.

A book is SimVQ's C = E W (Zhu et al., arXiv 2411.02038): the W that all rows share moves every code, chosen or not, so that no code
dies; in adaptation to a domain E stays as it is and W learns. Plain vectors (``vq``) and running means (``ema``) are options.
When the codebooks enter, rows start as the centres of a k-means over what they are to code (``start``): from random rows, which lie
far from vectors of another scale, nearly all vectors choose the same few.
Distances are fp32 whatever the precision, ties go to the lower code.

Legend: B items, L positions, D width, K codes of a book, N vectors that are quantised together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from utgrec.kmeans import kmeans
from utgrec.tokenizer.settings import Settings

START_NOISE = 0.01
"""Of a start's rows, in standard deviations."""


class Quantised(NamedTuple):
    codes_BL: Tensor
    read_BLD: Tensor
    """r: the sums of chosen codes, with the gradient of h."""
    loss: Tensor
    """L_Code, a mean over the items given."""


class Book(nn.Module):
    """SimVQ: C = E W^T. E starts as N(0, 1/D), W as a linear layer of torch does."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.E_KD = nn.Parameter(torch.randn(codes, width) * width**-0.5)
        self.W_DD = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.W_DD, a=5**0.5)

    @property
    def rows_KD(self) -> Tensor:
        """The code vectors, fp32."""
        with torch.autocast(self.E_KD.device.type, enabled=False):
            return self.E_KD.float() @ self.W_DD.float().T

    @torch.no_grad()
    def start(self, centres_KD: Tensor) -> None:
        """Make these the rows."""
        self.W_DD.copy_(torch.eye(len(self.W_DD)))
        self.E_KD.copy_(centres_KD)

    def freeze(self, adapt: str) -> None:
        """For adaptation to a domain: ``w`` leaves W to be trained, ``all`` both, ``none`` neither."""
        self.E_KD.requires_grad_(adapt == "all")
        self.W_DD.requires_grad_(adapt != "none")

    def learn(self, t_ND: Tensor, codes_N: Tensor) -> None:
        """Called in training after the codes are chosen: for books that do not learn by gradient."""

    def loss(self, t_ND: Tensor, chosen_ND: Tensor, beta: float) -> Tensor:
        """The book moves to what it codes; what is coded moves to the book, by ``beta``."""
        return F.mse_loss(chosen_ND, t_ND.detach()) + beta * F.mse_loss(t_ND, chosen_ND.detach())


class PlainBook(Book):
    """VQ: rows that are trained themselves."""

    def __init__(self, codes: int, width: int):
        nn.Module.__init__(self)
        self.E_KD = nn.Parameter(torch.randn(codes, width) * width**-0.5)

    @property
    def rows_KD(self) -> Tensor:
        return self.E_KD.float()

    @torch.no_grad()
    def start(self, centres_KD: Tensor) -> None:
        self.E_KD.copy_(centres_KD)

    def freeze(self, adapt: str) -> None:
        self.E_KD.requires_grad_(adapt == "all")


class MeanBook(Book):
    """EMA: each row is the running mean of what chose it (van den Oord et al., 2017, appendix A). No gradient.

    Many processes share their counts and sums, so that all have the same rows. A row's first visit sets it.
    """

    def __init__(self, codes: int, width: int, decay: float):
        nn.Module.__init__(self)
        self.decay, self.learns = decay, True
        self.register_buffer("sum_KD", torch.randn(codes, width) * width**-0.5)
        self.register_buffer("count_K", torch.ones(codes))

    @property
    def rows_KD(self) -> Tensor:
        return self.sum_KD / self.count_K.clamp(min=1e-5)[:, None]

    def start(self, centres_KD: Tensor) -> None:
        self.sum_KD.copy_(centres_KD)
        self.count_K.fill_(1.0)

    def freeze(self, adapt: str) -> None:
        self.learns = adapt == "all"

    @torch.no_grad()
    def learn(self, t_ND: Tensor, codes_N: Tensor) -> None:
        if not self.learns:
            return
        new_KD1 = torch.zeros(len(self.count_K), t_ND.size(1) + 1, device=t_ND.device)
        new_KD1.index_add_(0, codes_N, F.pad(t_ND.float(), (0, 1), value=1.0))
        if dist.is_initialized():
            dist.all_reduce(new_KD1)
        self.sum_KD.lerp_(new_KD1[:, :-1], 1 - self.decay)
        self.count_K.lerp_(new_KD1[:, -1], 1 - self.decay)

    def loss(self, t_ND: Tensor, chosen_ND: Tensor, beta: float) -> Tensor:
        return beta * F.mse_loss(t_ND, chosen_ND.detach())


class TreeQuantizer(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.of_L, self.beta = settings.books, settings.beta
        widths = dict(zip(settings.books, settings.widths, strict=True))
        self.books = nn.ModuleList(make_book(settings, codes) for codes in widths.values())

    def forward(self, h_BLD: Tensor) -> Quantised:
        t_BLD = prefix_residual(h_BLD).float()
        codes_BL = self.codes(t_BLD)
        chosen_BLD = torch.empty_like(t_BLD)
        losses = []
        for number, book in enumerate(self.books):
            here = [level for level, of in enumerate(self.of_L) if of == number]
            t_ND, codes_N = t_BLD[:, here].flatten(0, 1), codes_BL[:, here].flatten()
            chosen_ND = F.embedding(codes_N, book.rows_KD)
            losses.append(book.loss(t_ND, chosen_ND, self.beta))
            chosen_BLD[:, here] = chosen_ND.detach().view(len(h_BLD), len(here), -1)
            if self.training:
                book.learn(t_ND, codes_N)
        # t + sg(C[c] - t), summed over the prefix: the gradient of r_l goes to h_l, and none to the books
        read_BLD = (t_BLD + (chosen_BLD - t_BLD).detach()).cumsum(1)
        return Quantised(codes_BL, read_BLD, torch.stack(losses).mean())

    @torch.no_grad()
    def codes(self, t_BLD: Tensor) -> Tensor:
        """The nearest code of every position. [B, L]"""
        return torch.stack([self.distances(t_BLD[:, level], level).argmin(1) for level in range(len(self.of_L))], 1)

    @torch.no_grad()
    def distances(self, t_BD: Tensor, level: int) -> Tensor:
        """Squared distances [B, K] to the rows of a position's book."""
        rows_KD = self.books[self.of_L[level]].rows_KD
        with torch.autocast(t_BD.device.type, enabled=False):
            t_BD = t_BD.float()
            return t_BD.square().sum(1, keepdim=True) - 2 * t_BD @ rows_KD.T + rows_KD.square().sum(1)

    @torch.no_grad()
    def start(self, t_BLD: Tensor, seed: int) -> None:
        """Rows become the centres of a k-means of these prefix residuals. Centres that no vector needs lie a little beside another."""
        for number, book in enumerate(self.books):
            here = [level for level, of in enumerate(self.of_L) if of == number]
            t_ND, generator = t_BLD[:, here].flatten(0, 1).float(), torch.Generator().manual_seed(seed + number)
            centres_KD = kmeans(t_ND, len(book.rows_KD), seed=seed + number).centres_KD
            noise_KD = torch.randn(centres_KD.shape, generator=generator).to(centres_KD.device)
            book.start(centres_KD + START_NOISE * t_ND.std(0) * noise_KD)

    def freeze(self, adapt: str) -> None:
        for book in self.books:
            book.freeze(adapt)


def make_book(settings: Settings, codes: int) -> Book:
    if settings.book_kind == "ema":
        return MeanBook(codes, settings.code_width, settings.book_decay)
    return (Book if settings.book_kind == "simvq" else PlainBook)(codes, settings.code_width)


def prefix_residual(h_BLD: Tensor) -> Tensor:
    """t: the first vector, then each one's difference from the one before."""
    return torch.cat([h_BLD[:, :1], h_BLD[:, 1:] - h_BLD[:, :-1]], 1)
