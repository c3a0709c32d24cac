"""The decoders' layer against one layer of Hugging Face's Qwen2VLTextModel on the same weights: states and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utgrec.tokenizer.block import Block, BlockShape
from utgrec.tokenizer.decoders import PictureDecoder, TextDecoder

pytest.importorskip("transformers")
from transformers import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

SHAPES = {"tiny": BlockShape(48, 6, 2, 80), "head of 128": BlockShape(512, 4, 1, 256), "no groups": BlockShape(32, 2, 2, 64, theta=1e4)}


def theirs(shape: BlockShape) -> Qwen2VLTextModel:
    half = shape.head_width // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config = Qwen2VLTextConfig(
        vocab_size=7,
        hidden_size=shape.width,
        intermediate_size=shape.ff,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta, "mrope_section": sections},
        attn_implementation="eager",
    )
    return Qwen2VLTextModel(config)


def weights(block: Block, norm: torch.nn.Module) -> dict[str, Tensor]:
    """Of our layer and final norm under their names."""
    shape, layer = block.shape, "layers.0."
    sizes = [heads * shape.head_width for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    named = {f"{layer}self_attn.{part}_proj.weight": w for part, w in zip("qkv", block.qkv.weight.split(sizes), strict=True)}
    named |= {f"{layer}self_attn.{part}_proj.bias": b for part, b in zip("qkv", block.qkv.bias.split(sizes), strict=True)}
    named |= {f"{layer}mlp.{part}_proj.weight": w for part, w in zip(("gate", "up"), block.gate_up.weight.chunk(2), strict=True)}
    named |= {f"{layer}mlp.down_proj.weight": block.down.weight, f"{layer}self_attn.o_proj.weight": block.o.weight}
    named |= {
        f"{layer}input_layernorm.weight": block.attention_norm.weight,
        f"{layer}post_attention_layernorm.weight": block.ff_norm.weight,
    }
    return named | {"norm.weight": norm.weight}


def pair(decoder: TextDecoder | PictureDecoder) -> Qwen2VLTextModel:
    """Theirs, with our weights: biases and norms are not the initial ones, so that every part matters."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            deviation = 0.2 if parameter.dim() == 1 else parameter.size(-1) ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, deviation)
    other = theirs(decoder.block.shape)
    other.load_state_dict({name: value.detach().clone() for name, value in weights(decoder.block, decoder.norm).items()}, strict=False)
    return other


def additive(keep_BS: Tensor) -> Tensor:
    return torch.where(keep_BS, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(-1, 1, keep_BS.size(1), -1)


@pytest.mark.parametrize("name", SHAPES)
def test_text_decoder_and_its_gradients_equal_those_of_hugging_face(name: str) -> None:
    torch.manual_seed(5)
    decoder = TextDecoder(SHAPES[name])
    other = pair(decoder)
    prefix_BLW, text_BTW = torch.randn(3, 3, SHAPES[name].width), torch.randn(3, 9, SHAPES[name].width)
    keep_BT = torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
    ours_in = [x.clone().requires_grad_() for x in (prefix_BLW, text_BTW)]
    their_in = [x.clone().requires_grad_() for x in (prefix_BLW, text_BTW)]
    ours = decoder(*ours_in, keep_BT)[keep_BT]
    keep_BS = torch.cat([torch.ones(3, 3, dtype=torch.bool), keep_BT], 1)
    expected = other(inputs_embeds=torch.cat(their_in, 1), attention_mask=additive(keep_BS)).last_hidden_state[:, 3:][keep_BT]
    assert (ours - expected).abs().max() < 1e-5
    into = torch.randn_like(ours)
    ours.backward(into)
    expected.backward(into)
    for mine, their in zip(ours_in, their_in, strict=True):
        assert torch.allclose(mine.grad, their.grad, atol=1e-5, rtol=1e-4)
    for parameter in decoder.parameters():
        parameter.data = parameter.grad
    mapped = weights(decoder.block, decoder.norm)
    for place, parameter in other.named_parameters():
        if place in mapped:
            assert torch.allclose(mapped.pop(place), parameter.grad, atol=1e-5, rtol=1e-4), place
    assert not mapped


def test_picture_decoder_equals_hugging_face() -> None:
    torch.manual_seed(6)
    decoder = PictureDecoder(SHAPES["tiny"], latents=16)
    other = pair(decoder)
    prefix_BLW = torch.randn(2, 3, 48)
    whole = torch.cat([prefix_BLW, decoder.mask_W.expand(2, 16, -1)], 1)
    everything = torch.ones(2, 19, dtype=torch.bool)
    expected = other(inputs_embeds=whole, attention_mask=additive(everything)).last_hidden_state[:, 3:]
    assert (decoder(prefix_BLW) - expected).abs().max() < 1e-5


def test_a_two_dimensional_mask_would_have_made_theirs_causal() -> None:
    """What the 4-D mask is for: with the usual one the first position sees nothing of the last."""
    torch.manual_seed(7)
    decoder = PictureDecoder(SHAPES["tiny"], latents=4)
    other = pair(decoder)
    prefix_BLW = torch.randn(1, 3, 48)
    whole = torch.cat([prefix_BLW, decoder.mask_W.expand(1, 4, -1)], 1)
    causal = other(inputs_embeds=whole, attention_mask=torch.ones(1, 7, dtype=torch.long)).last_hidden_state[:, 3:]
    assert (decoder(prefix_BLW) - causal).abs().max() > 1e-2
