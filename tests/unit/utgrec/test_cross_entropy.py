"""Cross-entropy in chunks against torch's over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utgrec.tokenizer.cross_entropy import masked_cross_entropy


def problem(N: int, V: int = 37, D: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(N)
    hidden_ND, head_VD = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), torch.randint(V, (N,))


@pytest.mark.parametrize("chunk", [1, 4, 10, 64, None])
def test_loss_and_gradients_are_exact(chunk: int | None) -> None:
    hidden_ND, head_VD, targets_N = problem(10)
    loss = masked_cross_entropy(hidden_ND, head_VD, targets_N, chunk=chunk)
    expected = F.cross_entropy(hidden_ND @ head_VD.T, targets_N, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    ours = torch.autograd.grad(3.5 * loss, (hidden_ND, head_VD))
    theirs = torch.autograd.grad(3.5 * expected, (hidden_ND, head_VD))
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden_ND, head_VD, targets_N = problem(5, V=7, D=3)
    assert torch.autograd.gradcheck(lambda h, w: masked_cross_entropy(h, w, targets_N, chunk=2), (hidden_ND, head_VD))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden_ND, head_VD, targets_N = problem(6, dtype=torch.float32)
    loss = masked_cross_entropy(hidden_ND * 1e3, head_VD, targets_N, chunk=4)
    expected = F.cross_entropy((hidden_ND * 1e3) @ head_VD.T, targets_N, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden_ND, head_VD)))


def test_no_token_gives_a_zero_that_has_gradients() -> None:
    hidden_ND, head_VD, targets_N = problem(0)
    loss = masked_cross_entropy(hidden_ND, head_VD, targets_N)
    assert loss.item() == 0 and loss.requires_grad
    d_hidden_ND, d_head_VD = torch.autograd.grad(loss, (hidden_ND, head_VD))
    assert d_hidden_ND.shape == (0, 12)
    assert torch.equal(d_head_VD, torch.zeros_like(head_VD))


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    hidden_ND, head_VD, targets_N = problem(9)
    both = torch.autograd.grad(masked_cross_entropy(hidden_ND, head_VD, targets_N, chunk=4), (hidden_ND, head_VD))
    (head_VD if frozen == "head" else hidden_ND).requires_grad_(False)
    masked_cross_entropy(hidden_ND, head_VD, targets_N, chunk=4).backward()
    grads = (hidden_ND.grad, head_VD.grad)
    assert grads[frozen == "head"] is None
    assert torch.equal(grads[frozen != "head"], both[frozen != "head"])


def test_nothing_is_kept_without_gradients() -> None:
    hidden_ND, head_VD, targets_N = problem(9)
    with torch.no_grad():
        loss = masked_cross_entropy(hidden_ND, head_VD, targets_N, chunk=4)
    assert loss.grad_fn is None
    assert loss.item() == pytest.approx(masked_cross_entropy(hidden_ND, head_VD, targets_N).item())


def test_autocast_is_as_near_as_torch_under_autocast() -> None:
    hidden_ND, head_VD, targets_N = problem(200, V=500, D=64, dtype=torch.float32)
    exact = F.cross_entropy(hidden_ND.double() @ head_VD.double().T, targets_N, reduction="sum")
    true = torch.autograd.grad(exact, (hidden_ND, head_VD))
    with torch.autocast("cpu", torch.bfloat16):
        ours = masked_cross_entropy(hidden_ND, head_VD, targets_N, chunk=16)
        theirs = F.cross_entropy((hidden_ND @ head_VD.T).float(), targets_N, reduction="sum")
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=2e-3)
    for mine, their, right in zip(
        torch.autograd.grad(ours, (hidden_ND, head_VD)), torch.autograd.grad(theirs, (hidden_ND, head_VD)), true, strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() < 1.2 * (their - right).norm() + 1e-6


def test_bf16_weights_add_up_in_fp32() -> None:
    """A thousand chunks of one token: in bf16 the table's gradient would lose whatever is below 1/256 of it."""
    torch.manual_seed(0)
    hidden_ND = torch.ones(1000, 8, dtype=torch.bfloat16)
    head_VD = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = masked_cross_entropy(hidden_ND, head_VD, torch.zeros(1000, dtype=torch.int64), chunk=1)
    loss.backward()
    assert loss.dtype == torch.float32 and head_VD.grad.dtype == torch.bfloat16
    torch.testing.assert_close(head_VD.grad[0].float(), torch.full((8,), -750.0), rtol=4e-3, atol=0)
    torch.testing.assert_close(head_VD.grad[1].float(), torch.full((8,), 250.0), rtol=4e-3, atol=0)


def test_backward_may_run_twice() -> None:
    hidden_ND, head_VD, targets_N = problem(9)
    loss = masked_cross_entropy(hidden_ND, head_VD, targets_N)
    once = torch.autograd.grad(loss, head_VD, retain_graph=True)[0]
    twice = torch.autograd.grad(2 * loss, head_VD)[0]
    torch.testing.assert_close(twice, 2 * once)
