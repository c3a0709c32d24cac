"""Training under DeepSpeed's ZeRO on the CPU (gloo): the losses and weights of an unsharded training, checkpoint, what is left behind.

Each case is a program of its own, so that DeepSpeed's hooks and process groups stay out of the other tests. DeepSpeed compiles a small
operation for processes on one CPU (40 s, once a machine), which needs ninja and a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tests.unit.utgrec.small import training, weights
from utgrec.recommender.processes import Processes
from utgrec.tokenizer import saved, sharding
from utgrec.tokenizer.encoder import make_encoder

MISSING = [
    *(["DeepSpeed"] if importlib.util.find_spec("deepspeed") is None else []),
    *(["ninja"] if shutil.which("ninja") is None else []),
    *(["a C++ compiler"] if not (shutil.which("c++") or shutil.which("g++")) else []),
]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"ZeRO on the CPU needs {', '.join(MISSING)}")]

PARTS: dict[str, Any] = {"tokenizer_batch": 16, "tokenizer_micro": 4, "picture_decoder": False, "align_weight": 0.5}
"""Two passes with InfoNCE over all parts; nothing is drawn inside the model, so that processes change nothing."""
LORA: dict[str, Any] = {"lora_rank": 4, "checkpointing": True, "book_kind": "ema", "tokenizer_micro": 8}
"""Frozen weights that are sharded, too; layers that run twice; buffers."""
CASES = {
    "zero2, two processes": ("zero2", 2, PARTS),
    "zero3, two processes": ("zero3", 2, PARTS),
    "zero3, LoRA": ("zero3", 1, LORA),
}
STEPS, SAVED = 6, 3


def _losses(of: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        of.sums = {}
        of.train_step()
        found.append(sum(of.processes.sum(float(of.sums["loss"]))))
    return found


def _process(rank: int, folder: Path, stage: str, world: int, port: int, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    told = sharding.configuration

    def every_weight_sharded(*how: Any) -> dict[str, Any]:  # DeepSpeed leaves small weights whole, and here are no others
        config = told(*how)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    sharding.configuration = every_weight_sharded
    with Processes.of("cpu") as processes:
        # a step that the codebooks start before, and one more checkpoint than names
        tokenizer = training(folder / "sharded", processes, sharding=stage, **changes)
        losses = _losses(tokenizer, 1)
        tokenizer.optimizing.save(tokenizer.checkpoint, tokenizer.state())
        losses += _losses(tokenizer, SAVED - 1)
        tokenizer.optimizing.save(tokenizer.checkpoint, tokenizer.state())
        losses += _losses(tokenizer, STEPS - SAVED)
        tokenizer.optimizing.release()
        again = training(folder / "sharded", processes, sharding=stage, **changes)
        assert again.step == SAVED
        assert _losses(again, STEPS - SAVED) == losses[SAVED:]
        again.optimizing.release()
        mine, theirs = weights(tokenizer), weights(again)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
        # a plain model again: it is saved, loads, and others are made beside it
        assert all(type(module._parameters) is dict for module in tokenizer.model.modules())
        tokenizer.model.eval()
        if processes.first:
            np.savez(folder / "sharded.npz", losses=losses, **mine)
            saved.save(folder / "model", tokenizer.model, {})
            assert make_encoder(tokenizer.settings, ["some text"], seed=2).head_VD.numel()


def _uneven(rank: int, folder: Path, stage: str, port: int) -> None:
    """The second process has neither texts nor pictures: the same, unsharded and sharded."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    with Processes.of("cpu") as processes:
        for kind in ("none", stage):
            tokenizer = training(folder / kind / str(rank), processes, sharding=kind, quantise_after=0)
            if rank:
                tokenizer.catalogue.text_tokens = [tokens_T[:0] for tokens_T in tokenizer.catalogue.text_tokens]
                tokenizer.catalogue.moments = (None,) * len(tokenizer.catalogue.domains)
                tokenizer.catalogue.picture = lambda _: None  # type: ignore[method-assign]
            found.append(_losses(tokenizer, 3))
            tokenizer.optimizing.release()
            if processes.first:
                np.savez(folder / f"{kind}.npz", losses=found[-1], **weights(tokenizer))


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_process_without_texts_and_pictures_keeps_step(tmp_path: Path, stage: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_uneven, (tmp_path, stage, port), nprocs=2)
    with np.load(tmp_path / "none.npz") as plain, np.load(tmp_path / f"{stage}.npz") as sharded:
        assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert plain["losses"][2] < plain["losses"][0]


def _relative(one: dict[str, np.ndarray], other: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> dict[str, float]:
    """How far apart two trainings end, as a share of the way from the start, weight by weight."""
    return {
        name: float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(one[name] - start[name]))
        for name in one
        if (one[name] != start[name]).any()
    }


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_the_unsharded_one(tmp_path: Path, case: str) -> None:
    stage, world, changes = CASES[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (tmp_path, stage, world, port, changes), nprocs=world)
    plain = training(tmp_path / "plain", **changes)
    start, losses = weights(plain), _losses(plain, STEPS)
    with np.load(tmp_path / "sharded.npz") as archive:
        sharded = dict(archive)
    theirs = sharded.pop("losses")
    assert theirs[:3] == pytest.approx(losses[:3], rel=1e-5)
    assert theirs == pytest.approx(losses, rel=5e-3)  # the codebooks have entered, with Adam's count of steps at 3 and not at 1
    ends = weights(plain)
    assert sharded.keys() == ends.keys()
    away = _relative(ends, sharded, start)
    assert len(away) > 20
    assert max(value for name, value in away.items() if not name.startswith("quantizer")) < 0.05
    loaded = saved.load(tmp_path / "model").state_dict()
    assert all(np.array_equal(loaded[name].numpy(), sharded[name]) for name in sharded)
