"""Item texts -> sentence embeddings. TIGER (arXiv 2305.05065, section 3.1) takes Sentence-T5; any sentence-transformers model does.

In: the texts of a domain and the name of a model: a hub id, a folder, or one that ships as a Python package. Out: float32 [I, D] and
what a reader must know of it (model, revision, pooling, cut). Only texts are read, no interaction.

Nothing is downloaded here: methods run without a network. A hub model must lie in the Hugging Face cache beforehand; where it does
not, the error says what was looked for and which command fetches it.

Embeddings are cached by a digest of the texts, the model's content and the settings; sequences are cut and pooled as the model's own
files say, so the content covers both. A cache file is whole or absent, and two runs at a time do not disturb each other. Texts are
taken longest first, in blocks that are kept: an interrupted run goes on with the next block.

Legend: I items, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.contract import ContractError
from utgrec.base_model import find_model

SCHEMA = 1
BLOCK = 2048
"""Texts between two points from which an interrupted run goes on."""


@dataclass(frozen=True)
class Embeddings:
    x_ID: np.ndarray
    about: dict[str, Any]


def embed(
    texts: list[str],
    encoder: str,
    *,
    cache: Path,
    revision: str = "",
    tokens: int = 0,
    allow_missing: float = 0.5,
    device: str = "cpu",
    told: Callable[[int], None] | None = None,
) -> Embeddings:
    """Embed every text. ``tokens``: cut there, 0: where the model does. ``told`` hears how many texts are done.

    A text without content gets the mean of the others' embeddings, which says nothing; with more than a share of ``allow_missing``
    of them it raises ContractError.
    """
    empty = [item for item, text in enumerate(texts) if not text.strip()]
    if len(empty) == len(texts) or len(empty) > allow_missing * len(texts):
        raise ContractError(
            f"{len(empty):,} of {len(texts):,} items have no text (items {', '.join(map(str, empty[:5]))}, ...), "
            f"but missing_text allows a share of {allow_missing:g}: prepare the domain with its texts, or use given codes"
        )
    folder, identity = find_model(encoder, revision, key="encoder")
    written = sorted(set(texts) - {text for text in texts if not text.strip()}, key=lambda text: (-len(text), text))
    key = hashlib.sha256(json.dumps([SCHEMA, identity, tokens, device.split(":")[0], written]).encode()).hexdigest()[:32]
    file = cache / "embeddings" / f"{key}.npz"
    found = _read(file, len(written)) or _encode(written, folder, file, tokens, device, told)
    row = {text: index for index, text in enumerate(written)}
    mean_D = found.x_ID[[row[text] for text in texts if text in row]].mean(0, keepdims=True)
    x_ID = np.concatenate([found.x_ID, mean_D])[[row.get(text, -1) for text in texts]]
    about = {"encoder": encoder, "encoder_identity": identity, **found.about, "items_without_text": len(empty)}
    return Embeddings(x_ID, about)


def _encode(texts: list[str], folder: Path, file: Path, tokens: int, device: str, told: Callable[[int], None] | None) -> Embeddings:
    """Embed texts block after block; leaves the cache file."""
    try:
        from sentence_transformers import SentenceTransformer  # seconds of import, which a cached run is spared
    except ImportError as error:
        raise ContractError("item texts are embedded with sentence-transformers, which is not installed here: `pip install` it") from error
    # Weights may be stored in half precision; embeddings are fp32 on every device.
    model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs={"dtype": "float32"})
    if tokens:
        model.max_seq_length = min(tokens, model.max_seq_length or tokens)
    about = {"encoder_tokens": model.max_seq_length, "encoder_modules": _modules(model)}
    starts = range(0, len(texts), BLOCK)
    parts = [file.with_suffix(f".{start:08d}.part") for start in starts]
    blocks = []
    for start, path in zip(starts, parts, strict=True):
        block = texts[start : start + BLOCK]
        done = _read(path, len(block))
        if done is None:
            x_ID = model.encode(block, batch_size=128 if device.startswith("cuda") else 32, show_progress_bar=False)
            done = Embeddings(np.asarray(x_ID, np.float32), about)
            _write(path, done)
        blocks.append(done.x_ID)
        if told:
            told(start + len(block))
    whole = Embeddings(np.concatenate(blocks), about)
    _write(file, whole)
    for path in parts:
        path.unlink(missing_ok=True)
    return whole


def _modules(model: Any) -> str:
    """What the embedding goes through after the transformer: "mean pooling, Dense, Normalize"."""
    names = []
    for module in list(model)[1:]:
        mode = getattr(module, "pooling_mode", None)
        names.append(f"{mode if isinstance(mode, str) else '+'.join(mode)} pooling" if mode else type(module).__name__)
    return ", ".join(names)


# -------------------------------------------------------------------------------------------------------- the cache


def _write(path: Path, embeddings: Embeddings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, x=embeddings.x_ID, about=np.frombuffer(json.dumps(embeddings.about).encode(), np.uint8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path, rows: int) -> Embeddings | None:
    """What ``_write`` left, or None where there is nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = Embeddings(archive["x"], json.loads(archive["about"].tobytes()))
    except Exception:  # missing, cut off, or of other content: it is made again
        return None
    return found if found.x_ID.ndim == 2 and len(found.x_ID) == rows else None
