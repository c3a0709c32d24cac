"""The dual decoders: shapes, what sees what, padding, gradients, nothing to decode."""

from __future__ import annotations

import pytest
import torch

from utgrec.tokenizer.block import Block, BlockShape
from utgrec.tokenizer.decoders import PictureDecoder, TextDecoder

SHAPE = BlockShape(width=24, heads=6, kv_heads=2, ff=40)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def test_the_papers_decoder_has_its_parameters() -> None:
    """33.8M of a text decoder: the specification's count."""
    with torch.device("meta"):
        decoder = TextDecoder(BlockShape(width=1536, heads=12, kv_heads=2, ff=4 * 1536))
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(33.8e6, rel=2e-3)


def test_initial_weights() -> None:
    """N(0, 0.02) at the paper's width; narrower layers start larger, so that what goes through keeps its size."""
    block = Block(BlockShape(width=384, heads=4, kv_heads=2, ff=512))
    for layer in (block.qkv, block.o, block.gate_up, block.down):
        assert layer.weight.std().item() == pytest.approx(0.04, rel=0.02)
        assert abs(layer.weight.mean().item()) < 6e-4
    assert not block.qkv.bias.any() and block.o.bias is None
    assert PictureDecoder(BlockShape(width=4096, heads=4, kv_heads=2, ff=8)).mask_W.std().item() == pytest.approx(0.02, rel=0.05)


def test_padding_changes_nothing() -> None:
    decoder = TextDecoder(SHAPE)
    prefix_BLW, text_BTW = torch.randn(1, 3, 24), torch.randn(1, 7, 24)
    alone = decoder(prefix_BLW, text_BTW[:, :4], torch.ones(1, 4, dtype=torch.bool))
    padded = decoder(prefix_BLW, text_BTW, torch.arange(7)[None] < 4)
    torch.testing.assert_close(padded[:, :4], alone)


def test_every_token_sees_all_codes_and_both_sides_of_the_text() -> None:
    decoder = TextDecoder(SHAPE)
    prefix_BLW, text_BTW = torch.randn(1, 3, 24, requires_grad=True), torch.randn(1, 6, 24, requires_grad=True)
    hidden_BTW = decoder(prefix_BLW, text_BTW, torch.ones(1, 6, dtype=torch.bool))
    for token in range(6):
        d_prefix, d_text = torch.autograd.grad(hidden_BTW[0, token].square().sum(), (prefix_BLW, text_BTW), retain_graph=True)
        assert (d_prefix.abs().sum(-1) > 0).all()
        assert (d_text.abs().sum(-1) > 0).all()


def test_latents_differ_by_position_alone() -> None:
    decoder = PictureDecoder(SHAPE, latents=16)
    with torch.no_grad():
        decoder.block.qkv.weight.mul_(20)
    z_BPW = decoder(torch.randn(2, 3, 24))
    assert z_BPW.shape == (2, 16, 24)
    assert (z_BPW[:, 1:] - z_BPW[:, :-1]).abs().amax((1, 2)).min() > 1e-4
    z_BPW.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    assert decoder.mask_W.grad.abs().max() > 0


def test_no_rows_and_rows_without_text() -> None:
    prefix_BLW = torch.randn(2, 3, 24, requires_grad=True)
    nothing = TextDecoder(SHAPE)(prefix_BLW, torch.randn(2, 4, 24), torch.zeros(2, 4, dtype=torch.bool))
    assert nothing.isfinite().all()
    nothing.sum().backward()
    assert prefix_BLW.grad.isfinite().all()
    assert PictureDecoder(SHAPE, 16)(prefix_BLW[:0]).shape == (0, 16, 24)


@pytest.mark.parametrize("shape", [(10, 3, 3, 8), (12, 4, 3, 8), (12, 4, 4, 8)])
def test_a_shape_that_cannot_be_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must divide"):
        BlockShape(*shape)


def test_under_autocast_norms_stay_exact() -> None:
    decoder = TextDecoder(SHAPE)
    prefix_BLW, text_BTW, keep_BT = torch.randn(2, 3, 24), torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = decoder(prefix_BLW.bfloat16(), text_BTW, keep_BT)
    torch.testing.assert_close(mixed.float(), decoder(prefix_BLW, text_BTW, keep_BT), atol=0.05, rtol=0.05)
