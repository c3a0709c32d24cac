"""Our T5 against Hugging Face's on the same weights: logits, loss and gradients."""

from __future__ import annotations

import pytest
import torch

from utgrec.recommender.model import PAD, T5, Shape, from_hugging_face, hugging_face_config, to_hugging_face

transformers = pytest.importorskip("transformers")

SHAPES = {
    "tiny": Shape(vocabulary=97, d_model=24, d_ff=40, heads=3, d_kv=8, encoder_layers=2, decoder_layers=3),
    "far": Shape(vocabulary=50, d_model=16, d_ff=32, heads=2, d_kv=4, encoder_layers=1, decoder_layers=1, buckets=8, max_distance=12),
    "tiger": Shape(vocabulary=1026),
}


def pair(name: str) -> tuple[T5, torch.nn.Module]:
    torch.manual_seed(3)
    ours = T5(SHAPES[name])
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**hugging_face_config(SHAPES[name])))
    return ours.eval(), theirs.eval()


def batch(shape: Shape, longest: int = 81, rows: int = 5, codes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BS = torch.randint(2, shape.vocabulary, (rows, longest))
    for row, length in enumerate(torch.linspace(5, longest, rows).long()):
        tokens_BS[row, length:] = PAD
    return tokens_BS, torch.randint(2, shape.vocabulary, (rows, codes))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_equal_those_of_hugging_face(name: str) -> None:
    ours, theirs = pair(name)
    from_hugging_face(ours, theirs.state_dict())
    tokens_BS, codes_BL = batch(SHAPES[name])
    expected = theirs(input_ids=tokens_BS, attention_mask=(tokens_BS != PAD).long(), labels=codes_BL)
    assert (ours.logits(tokens_BS, codes_BL) - expected.logits).abs().max() < 1e-5
    loss = ours(tokens_BS, codes_BL)
    assert abs(loss - expected.loss) < 1e-5
    loss.backward()
    expected.loss.backward()
    gradients = T5(SHAPES[name])
    gradients.load_state_dict({place: value.grad for place, value in ours.named_parameters()})
    mapped = to_hugging_face(gradients)
    for place, parameter in theirs.named_parameters():
        assert torch.allclose(mapped[place], parameter.grad, atol=1e-5), place


def test_the_weights_go_there_and_back() -> None:
    ours, theirs = pair("tiny")
    missing, unexpected = theirs.load_state_dict({k: v.clone() for k, v in to_hugging_face(ours).items()}, strict=False)
    assert not missing and not unexpected
    again = T5(SHAPES["tiny"])
    from_hugging_face(again, theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_missing_weight_is_named() -> None:
    ours, theirs = pair("tiny")
    weights = theirs.state_dict()
    del weights["decoder.final_layer_norm.weight"]
    with pytest.raises(KeyError, match=r"decoder.final_layer_norm.weight"):
        from_hugging_face(ours, weights)


def test_initial_weights_have_the_deviations_of_hugging_face() -> None:
    ours, theirs = pair("tiger")
    for name, value in to_hugging_face(ours).items():
        expected = theirs.state_dict()[name]
        assert value.std() == pytest.approx(float(expected.std()), rel=0.12, abs=1e-6), name
