"""The packed, written-out training step against plain torch on padded rows; dropout; half precision; compiled.

Parity with Hugging Face stands in tests/parity/test_t5.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from utgrec.recommender import fused, model
from utgrec.recommender.data import Batch, stairs
from utgrec.recommender.model import IGNORED, PAD, T5, Shape

SHAPE = Shape(vocabulary=60, d_model=16, d_ff=24, heads=3, d_kv=4, encoder_layers=2, decoder_layers=2, dropout=0.0)
LENGTHS = torch.tensor([5, 5, 9, 13, 13, 13, 17, 33, 33, 81])


def made(shape: Shape = SHAPE) -> T5:
    torch.manual_seed(1)
    return T5(shape).train()


def padded_rows(lengths: torch.Tensor = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    tokens_BS = torch.randint(2, SHAPE.vocabulary, (len(lengths), int(lengths.max())))
    tokens_BS[torch.arange(tokens_BS.size(1)) >= lengths[:, None]] = PAD
    return tokens_BS, torch.randint(3, SHAPE.vocabulary, (len(lengths), 4))


def packed_rows() -> Batch:
    tokens_BS, codes_BL = padded_rows()
    lengths, counts = LENGTHS.unique(return_counts=True)
    return Batch(tokens_BS[tokens_BS != PAD], codes_BL, tuple(zip(counts.tolist(), lengths.tolist(), strict=True)))


def gradients(t5: T5, *rows: object) -> tuple[float, dict[str, torch.Tensor]]:
    t5.zero_grad()
    loss = t5(*rows)
    loss.backward()
    return loss.item(), copies(t5)


def copies(t5: T5) -> dict[str, torch.Tensor]:
    """The gradients of all parameters: none may be missing."""
    return {name: value.grad.clone() for name, value in t5.named_parameters()}  # type: ignore[union-attr]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, the model works as it does on a GPU."""
    return lambda: monkeypatch.setattr(model, "written_out", lambda _: False)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=tolerance, rtol=1e-4), name


@pytest.mark.parametrize("piece", [7, 50, 1024])
def test_packed_equals_padded_and_written_out_equals_plain(piece: int, plain: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PIECE", piece)
    t5, batch = made(), packed_rows()
    packed_loss, packed = gradients(t5, *batch)
    shuffle = torch.randperm(len(LENGTHS))
    padded_loss, padded = gradients(t5, *(part[shuffle] for part in padded_rows()))
    logits = t5.logits(*padded_rows())
    memory = t5.encode(padded_rows()[0])
    plain()
    plain_loss, plainly = gradients(t5, *padded_rows())
    stepped_loss, stepped = gradients(t5, *batch.into(((4, 21), (7, 33), (2, 81))))  # with padding and rows to spare
    assert packed_loss == pytest.approx(plain_loss, abs=1e-6)
    assert padded_loss == pytest.approx(plain_loss, abs=1e-6)
    assert stepped_loss == pytest.approx(plain_loss, abs=1e-6)
    for other in (packed, padded, stepped):
        same(plainly, other)
    assert torch.allclose(logits, t5.logits(*padded_rows()), atol=1e-5)
    real = padded_rows()[0] != PAD
    assert torch.allclose(memory[real], t5.encode(padded_rows()[0])[real], atol=1e-5)


LAYOUT = ((2, 3), (1, 4))
HOW = fused.How(0.3, 1e-6, torch.float64, True)


@pytest.mark.parametrize("piece", [4, 1024])
@pytest.mark.parametrize("part", ["feed forward", "self-attention", "memory", "dropout"])
def test_gradients_with_dropout_are_those_of_finite_differences(part: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, with the same masks in every evaluation."""
    monkeypatch.setattr(fused, "PIECE", piece)
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    functions: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
        "feed forward": (lambda *x: fused.FeedForward.apply(*x, HOW), (random(10, 4), random(4), random(6, 4), random(4, 6))),
        "self-attention": (
            lambda *x: fused.SelfAttention.apply(*x, LAYOUT, HOW),
            (random(10, 4), random(4), random(12, 4), random(4, 4), random(2, 4, 4)),
        ),
        "memory": (lambda *x: fused.AttendMemory.apply(*x, LAYOUT, HOW), (random(3, 5, 4), random(10, 4))),
        "dropout": (lambda x: fused.Dropout.apply(x, 0.3), (random(10, 4),)),
    }
    function, inputs = functions[part]

    def seeded(*x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return function(*x)

    assert torch.autograd.gradcheck(seeded, inputs)
    # And the masks are at work: another seed, another result.
    torch.manual_seed(8)
    assert not torch.allclose(function(*inputs), seeded(*inputs))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_it_should(p: float) -> None:
    torch.manual_seed(0)
    mask = fused.kept(torch.empty(1000, 1003), p)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float(mask.mean()) - (1 - p)) < 4 * deviation + 1 / 65536
    both = float((mask[:, 1:] * mask[:, :-1]).mean())  # neighbours are independent
    assert abs(both - (1 - p) ** 2) < 6 * deviation
    assert fused.scale(p) == pytest.approx(1 / (1 - p), rel=2e-5) and fused.scale(0.0) == 1.0


def test_dropout_changes_the_loss_as_it_does_in_plain_torch(plain: Callable[[], None]) -> None:
    """Same mean and same spread over seeds: every place where T5 drops out does so, in both ways of working."""
    t5 = made(Shape(vocabulary=60, d_model=16, d_ff=24, heads=3, d_kv=4, encoder_layers=1, decoder_layers=1, dropout=0.3))
    rows = padded_rows(torch.tensor([9, 13, 17]))

    @torch.no_grad()
    def losses() -> torch.Tensor:
        torch.manual_seed(0)
        return torch.stack([t5(*rows) for _ in range(250)])

    written = losses()
    plain()
    plainly = losses()
    error = ((written.var() + plainly.var()) / 250) ** 0.5
    assert abs(written.mean() - plainly.mean()) < 4 * error
    assert float(written.std() / plainly.std()) == pytest.approx(1.0, abs=0.2)
    exact = t5.eval()(*rows).item()
    assert abs(written.mean() - exact) > 4 * error, "dropout at this rate moves the mean loss: the comparison means something"


def test_the_seed_decides_the_masks() -> None:
    t5, batch = made(Shape(**{**SHAPE.__dict__, "dropout": 0.1})), packed_rows()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(gradients(t5, *batch))
    assert results[0][0] == results[1][0] != results[2][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_evaluation_drops_nothing_and_needs_no_gradient() -> None:
    t5 = made(Shape(**{**SHAPE.__dict__, "dropout": 0.5})).eval()
    with_gradient = t5(*packed_rows())
    with torch.no_grad():
        without = t5(*packed_rows())
    assert torch.equal(with_gradient.detach(), without) and without.grad_fn is None
    assert torch.equal(without, t5(*packed_rows()))


@pytest.mark.parametrize("how", ["written out", "plain"])
def test_bf16_is_near_fp32_and_keeps_gradients_in_fp32(how: str, plain: Callable[[], None]) -> None:
    t5, batch = made(), packed_rows()
    exact_loss, exact = gradients(t5, *batch)
    if how == "plain":
        plain()
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half = gradients(t5, *batch)
    assert half_loss == pytest.approx(exact_loss, rel=5e-3) and half_loss != exact_loss
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert torch.cosine_similarity(value.flatten(), exact[name].flatten(), 0) > 0.99, name


def test_padding_among_packed_rows_is_refused() -> None:
    tokens_N, codes_BL, layout = packed_rows()
    tokens_N[3] = PAD
    with pytest.raises(ValueError, match="packed rows with padding"):
        made()(tokens_N, codes_BL, layout)


def test_rows_to_spare_do_not_count(plain: Callable[[], None]) -> None:
    plain()
    t5, batch = made(), packed_rows()
    alone = t5(*batch).item()
    filled = batch.into((*((count, length) for count, length in batch.layout), (6, 81)))
    assert (filled.codes_BL == IGNORED).all(1).sum() == 6
    assert t5(*filled).item() == pytest.approx(alone, abs=1e-6)


def test_the_model_compiles_as_one_graph_for_a_layout() -> None:
    """What GPUs run. ``aot_eager`` traces forward and backward as the real compiler does, without its minute."""
    t5, batch = made(Shape(**{**SHAPE.__dict__, "encoder_layers": 1, "decoder_layers": 1})), packed_rows()
    laid_out = batch.into(stairs(LENGTHS.numpy(), 12, steps=2))
    expected, uncompiled = gradients(t5, *batch)
    compiled = torch.compile(t5, backend="aot_eager", fullgraph=True, dynamic=False)
    t5.zero_grad()
    loss = compiled(*laid_out)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    same(uncompiled, copies(t5))
