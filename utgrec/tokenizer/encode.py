"""From a trained tokenizer to the semantic ids of a domain (UTGRec section 3.2, 3.6).

In: a model, a catalogue, the number of one of its domains. Out: ``SemanticIds``: all items of the domain get codes, those that never
occur in training, too; items with equal codes are told apart by ``NearestLast`` (the nearest free leaf, then the nearest free code
before it, up to the root), and the bijection is asserted.

Items are encoded once, blocks of them by each process; blocks that are done survive a kill.

Legend: X rows of the catalogue, I items of the domain, B items that are encoded together, L positions, D width of codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utgrec.recommender.processes import Processes
from utgrec.semantic_ids import NearestLast, SemanticIds, usage
from utgrec.tokenizer.data import Catalogue
from utgrec.tokenizer.model import UniversalTokenizer

BLOCK = 1024
"""Items between two points from which an interrupted run goes on."""
BATCH = 64


def semantic_ids(
    model: UniversalTokenizer,
    catalogue: Catalogue,
    domain: int,
    processes: Processes,
    *,
    precision: str = "fp32",
    folder: Path | None = None,
    told: Callable[[int], None] | None = None,
) -> SemanticIds:
    """The ids of one domain's items. ``folder``: for finished blocks. ``told`` hears how many items are done."""
    settings = model.settings
    codes_IL, t_ILD = encode(model, catalogue, domain, processes, precision=precision, folder=folder, told=told)
    raw = SemanticIds.of(codes_IL, settings.widths, settings.books)
    rows = [model.quantizer.books[of].rows_KD.detach().cpu().numpy() for of in settings.books]
    ids = NearestLast.of(list(t_ILD.transpose(1, 0, 2)), rows).repair(raw)
    return dataclasses.replace(ids, report={**usage(codes_IL, settings.widths), **ids.report})


def encode(
    model: UniversalTokenizer,
    catalogue: Catalogue,
    domain: int,
    processes: Processes,
    *,
    precision: str = "fp32",
    folder: Path | None = None,
    told: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [I, L] and prefix residuals fp32 [I, L, D] of all items of a domain."""
    first, end = catalogue.first_D[domain], catalogue.first_D[domain + 1]
    mine_X = processes.share(np.arange(first, end))
    key = _key(model, catalogue, domain, precision)
    codes, vectors = [], []
    for start in range(0, max(len(mine_X), 1), BLOCK):
        path = folder / f"codes-{key}-{processes.rank}of{processes.world}-{start}.npz" if folder else None
        found = _read(path)
        if found is None:
            found = encode_rows(model, catalogue, mine_X[start : start + BLOCK], processes.device, precision)
            _write(path, *found)
        codes.append(found[0])
        vectors.append(found[1])
        if told:
            told(min(start + BLOCK, len(mine_X)))
    parts = (np.concatenate(codes), np.concatenate(vectors))
    codes_IL, t_ILD = (processes.gather_rows(part, int(end - first)) for part in parts)
    return codes_IL, t_ILD


def encode_rows(
    model: UniversalTokenizer, catalogue: Catalogue, rows_X: np.ndarray, device: torch.device, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and prefix residuals of these rows. Items of like length go together, so that short ones do not pay for long ones."""
    settings = model.eval().settings
    codes_XL = np.empty((len(rows_X), settings.levels), np.int32)
    t_XLD = np.empty((len(rows_X), settings.levels, settings.code_width), np.float32)
    order_X = np.argsort(-catalogue.lengths(rows_X), kind="stable")
    for start in range(0, len(order_X), BATCH):
        places_B = order_X[start : start + BATCH]
        batch = model.encoder.collate(catalogue.prompts(rows_X[places_B])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            codes_BL, t_BLD = model.codes(batch)
        codes_XL[places_B], t_XLD[places_B] = codes_BL.cpu().numpy(), t_BLD.cpu().numpy()
    return codes_XL, t_XLD


def _key(model: UniversalTokenizer, catalogue: Catalogue, domain: int, precision: str) -> str:
    """Of what decides the codes."""
    digest = hashlib.sha256(f"{catalogue.domains[domain].info['digest']} {precision} {model.settings}".encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(("text_decoder", "picture_decoder", "diffusion")):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path | None) -> tuple[np.ndarray, np.ndarray] | None:
    if path is None or not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return archive["codes"], archive["vectors"]


def _write(path: Path | None, codes_XL: np.ndarray, t_XLD: np.ndarray) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, codes=codes_XL, vectors=t_XLD)
        os.replace(temporary, path)
