"""Codebooks: the specification's vectors, who gets which gradient, ties, options, precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utgrec.semantic_ids import usage
from utgrec.tokenizer.codebook import TreeQuantizer, prefix_residual
from utgrec.tokenizer.settings import Settings

DOUBLE = torch.float64


def dyadic(a: int, b: int, c: int, s: int, m: int, q: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """F(a,b,c,s,m,q)[i,j,k] of the specification, section 9."""
    i, j, k = (torch.arange(n) for n in shape)
    return ((a * i[:, None, None] + b * j[None, :, None] + c * k + s) % m - m // 2) / q


H = dyadic(5, 3, 7, 1, 11, 8, (3, 3, 4))


def vector_quantizer(**changes: object) -> TreeQuantizer:
    """Vector V2: d = 4, root 4, leaf 8."""
    quantizer = TreeQuantizer(Settings(levels=3, root=4, leaf=8, code_width=4, **changes))  # type: ignore[arg-type]
    j, k = torch.arange(8)[:, None], torch.arange(4)
    a, b = torch.arange(4)[:, None], torch.arange(4)
    values = {
        "books.0.E_KD": ((5 * j + 3 * k + 1) % 7 - 3)[:4] / 4,
        "books.1.E_KD": ((4 * j + 5 * k + 2) % 9 - 4) / 4,
        "books.0.W_DD": torch.eye(4) + ((a + 2 * b) % 3 - 1) / 8,
        "books.1.W_DD": torch.eye(4) + ((2 * a + b + 1) % 3 - 1) / 8,
    }
    quantizer.load_state_dict(values)
    return quantizer


def test_v1_prefix_residual_is_undone_by_the_cumulative_sum() -> None:
    t = prefix_residual(H)
    assert t[0].tolist() == [[-0.5, 0.375, -0.125, -0.625], [0.375, -1, 0.375, 0.375], [0.375, 0.375, 0.375, 0.375]]
    assert t[2, 2].tolist() == [0.375, -1, 0.375, 0.375]
    assert torch.equal(t.cumsum(1), H)


def test_v2_codes_losses_and_what_is_read() -> None:
    quantizer = vector_quantizer()
    assert quantizer.books[0].rows_KD[0].tolist() == [-0.40625, 0.125, -0.71875, 0.09375]
    assert quantizer.books[1].rows_KD[1].tolist() == [0.34375, -0.4375, 0.84375, -0.40625]
    found = quantizer(H)
    assert found.codes_BL.tolist() == [[0, 1, 1], [2, 6, 7], [3, 1, 1]]
    assert found.loss.item() == pytest.approx(0.297953287760, abs=1e-6)
    r = [[-0.40625, 0.125, -0.71875, 0.09375], [-0.0625, -0.3125, 0.125, -0.3125], [0.28125, -0.75, 0.96875, -0.71875]]
    assert torch.allclose(found.read_BLD[0], torch.tensor(r), atol=1e-6)
    assert torch.allclose(found.read_BLD[2, 2], torch.tensor([0.5, -0.5, 1.25, -0.5]), atol=1e-6)


def test_v2_gradients_of_the_code_loss() -> None:
    quantizer, h = vector_quantizer(), H.clone().requires_grad_()
    quantizer(h).loss.backward()
    squares = {"h": h.grad.square().sum()} | {name: p.grad.square().sum() for name, p in quantizer.named_parameters()}
    expected = {
        "h": 3.1161838108e-3,
        "books.0.E_KD": 9.2363357544e-3,
        "books.0.W_DD": 8.2088046604e-3,
        "books.1.E_KD": 1.7837418450e-2,
        "books.1.W_DD": 2.5430043538e-2,
    }
    assert {name: float(value) for name, value in squares.items()} == pytest.approx(expected, rel=1e-4)
    assert h.grad[0, 0].tolist() == pytest.approx([-0.0022786458, 0.0110677083, 0.0172526042, -0.0231119792], abs=1e-7)


def test_decoders_send_their_gradient_to_the_vectors_and_none_to_the_books() -> None:
    quantizer, h = vector_quantizer(), H.clone().requires_grad_()
    weights = torch.randn(H.shape, generator=torch.Generator().manual_seed(0))
    (quantizer(h).read_BLD * weights).sum().backward()
    assert torch.allclose(h.grad, weights, atol=1e-6)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())


@pytest.mark.parametrize(("adapt", "trained"), [("w", {"W_DD"}), ("all", {"E_KD", "W_DD"}), ("none", set())])
def test_what_adaptation_trains(adapt: str, trained: set[str]) -> None:
    quantizer = vector_quantizer()
    quantizer.freeze(adapt)
    quantizer(H).loss.backward() if trained else None
    assert {name.split(".")[-1] for name, p in quantizer.named_parameters() if p.requires_grad} == trained
    assert {name.split(".")[-1] for name, p in quantizer.named_parameters() if p.grad is not None} == trained


def test_residuals_do_not_depend_on_the_codebook() -> None:
    """It is no residual quantisation: the second position codes a difference of vectors, whatever the first one chose."""
    quantizer = vector_quantizer()
    before = quantizer(H).codes_BL[:, 1:]
    with torch.no_grad():
        quantizer.books[0].E_KD.add_(7.0)
    after = quantizer(H).codes_BL
    assert torch.equal(before, after[:, 1:])


def test_leaves_share_one_book_and_without_the_tree_none_do() -> None:
    assert [len(book.rows_KD) for book in TreeQuantizer(Settings(root=4, leaf=8)).books] == [4, 8]
    assert [len(book.rows_KD) for book in TreeQuantizer(Settings(root=4, leaf=8, tree=False)).books] == [4, 8, 8]


def test_of_equal_distances_the_lower_code_wins() -> None:
    quantizer = vector_quantizer()
    with torch.no_grad():
        quantizer.books[0].E_KD[3] = quantizer.books[0].E_KD[1]
    t = prefix_residual(H).clone()
    t[:, 0] = quantizer.books[0].rows_KD[1].detach()
    assert quantizer.codes(t)[:, 0].tolist() == [1, 1, 1]


def test_distances_are_fp32_under_autocast() -> None:
    quantizer = vector_quantizer()
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(H.bfloat16())
    assert found.codes_BL.tolist() == [[0, 1, 1], [2, 6, 7], [3, 1, 1]]  # V1's values are exact in bf16
    assert quantizer.distances(H[:, 0], 0).dtype == torch.float32


@pytest.mark.parametrize("kind", ["simvq", "vq", "ema"])
def test_every_kind_of_book_learns_clusters(kind: str) -> None:
    """Twelve clusters: after training the books explain most of the variance, and use many codes."""
    torch.manual_seed(0)
    settings = Settings(levels=2, root=16, leaf=16, code_width=8, book_kind=kind, book_decay=0.8)
    quantizer = TreeQuantizer(settings)
    centres = torch.randn(12, 2, 8)
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    first = None
    for _ in range(300):
        h = (centres[torch.randint(12, (256,))] + 0.05 * torch.randn(256, 2, 8)).cumsum(1)
        found = quantizer(h)
        error = (found.read_BLD.detach() - h).square().mean()
        first = first or float(error)
        if found.loss.requires_grad:
            found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(error) < 0.35 * first
    assert usage(found.codes_BL.numpy(), settings.widths)["perplexity_1"] > 4


def test_running_means_become_the_means_of_what_chose_them() -> None:
    quantizer = TreeQuantizer(Settings(levels=1, root=2, leaf=2, code_width=2, book_kind="ema", book_decay=0.5)).train()
    book = quantizer.books[0]
    book.sum_KD.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    h = torch.tensor([[3.0, 1.0], [5.0, 3.0], [-2.0, 0.0]])[:, None]
    for _ in range(40):
        quantizer(h)
    assert torch.allclose(book.rows_KD, torch.tensor([[4.0, 2.0], [-2.0, 0.0]]), atol=1e-4)
    quantizer.freeze("w")
    before = book.rows_KD.clone()
    quantizer(h + 1)
    assert torch.equal(before, book.rows_KD)


def test_usage_and_perplexity() -> None:
    codes = np.array([[0, 1], [1, 1], [2, 1], [3, 1]])
    assert usage(codes, (8, 4)) == pytest.approx({"usage_1": 0.5, "perplexity_1": 4.0, "usage_2": 0.25, "perplexity_2": 1.0})
    assert math.isfinite(usage(codes[:0], (8, 4))["perplexity_1"])
