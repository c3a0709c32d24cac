"""What an item encoder is: text and picture of an item -> L hidden states, one at each code token (UTGRec section 3.1).

In: item texts, pictures as the bytes of an image file. Out: ``[B, L, D]``, the states at the L code tokens that stand behind the
item's content, after the final norm; nothing else of the sequence is computed on. The text decoder shares the input table (``embed``)
and has an output table of its own kind (``head_VD``), so both live here.

Three encoders: ``qwen2-vl`` (qwen.py), ``tiny`` (tiny.py: its classes, random weights), ``text`` (sentence.py). Prompts are made on
the CPU, once an item; ``collate`` puts some side by side, ``forward`` runs where the weights are.

Legend: B items, S tokens of a prompt, L code tokens, D width, V vocabulary, P patches of pictures, C numbers of a patch,
N picture tokens (4 patches each).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.contract import ContractError
from utgrec.tokenizer.settings import Settings

if TYPE_CHECKING:
    from utgrec.tokenizer.block import BlockShape


@dataclass(frozen=True)
class Prompt:
    """What an encoder reads of one item."""

    tokens_S: np.ndarray
    """int32, ends with the L code tokens."""
    patches_PC: np.ndarray | None = None
    """The picture, uint8; None: there is none, or its features are known."""
    grid: tuple[int, int, int] | None = None
    """Frames (1), rows and columns of patches; None: no picture."""
    features_ND: np.ndarray | None = None
    """What the frozen vision tower says of the picture, from the cache (a view of the file)."""

    def __len__(self) -> int:
        return len(self.tokens_S)


@dataclass(frozen=True)
class EncoderBatch:
    """Prompts side by side, padded at the right."""

    tokens_BS: Tensor
    lengths_B: Tensor
    positions_3BS: Tensor | None = None
    """Frame, row and column of each token (M-RoPE)."""
    patches_PC: Tensor | None = None
    """Of all pictures without known features, one after the other."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """Of these pictures."""
    places_N: Tensor | None = None
    """Where their features go, in the flat [B x S]."""
    features_ND: Tensor | None = None
    """Known features of the other pictures."""
    feature_places_N: Tensor | None = None
    order_B: Tensor | None = None
    """Rows from the longest to the shortest."""
    groups: tuple[tuple[int, int, int], ...] = ()
    """First, end and length of what goes through the layers together: places in ``order_B``, tokens of the longest row."""

    def to(self, device: torch.device | str) -> EncoderBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> EncoderBatch:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> EncoderBatch:
        return dataclasses.replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})


class Encoder(nn.Module, ABC):
    """The base of all encoders."""

    levels: int
    """L"""
    width: int
    """D"""
    vocabulary: int
    """V: of both tables, code tokens and mask token included."""
    layers: int
    """Transformer layers that a prompt goes through."""
    mask_token: int
    ordinary_tokens: np.ndarray
    """What a random token may be: no special, padding, mask or code token."""
    special_tokens: np.ndarray
    """What is never selected for masking."""
    block: BlockShape
    """What a layer of the decoders looks like beside this encoder."""
    head_VD: nn.Parameter
    """The output table of the text decoder: starts as a copy of the input table and is trained apart from it."""

    def prompts(self, texts: Sequence[str], pictures: Sequence[bytes | None]) -> list[Prompt]:
        """A prompt an item. An empty text is none; a picture that no decoder reads counts as none."""
        return [self.prompt(tokens_T, picture) for tokens_T, picture in zip(self.text_tokens(texts), pictures, strict=True)]

    @abstractmethod
    def prompt(self, tokens_T: np.ndarray, picture: bytes | None) -> Prompt:
        """The prompt of one item, its text as ``text_tokens`` gives it. Threads may call it side by side."""

    @abstractmethod
    def length(self, tokens_T: np.ndarray, picture: bytes | None) -> int:
        """How long ``prompt`` will be, without decoding the picture: a file that breaks off behind its head counts as whole."""

    @abstractmethod
    def text_tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What the text decoder rebuilds of each text: its tokens (int32) cut at ``text_tokens``, without anything around them."""

    @abstractmethod
    def collate(self, prompts: Sequence[Prompt]) -> EncoderBatch: ...

    @abstractmethod
    def forward(self, batch: EncoderBatch) -> Tensor:
        """[B, L, D]"""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the input table."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For the configuration of a saved model and for the record: which model with which weights, and how it runs.

        ``kind``, ``model``, ``revision``; ``digest``: what tells the base weights from any others; ``attention``, ``frozen_weights``.
        """

    def cache_pictures(
        self,
        pictures: Iterable[bytes | None],
        folder: Path,
        *,
        batch: int = 64,
        writer: str = "0",
        told: Callable[[int], None] | None = None,
    ) -> None:
        """Compute what a frozen vision tower says of these pictures, once, and let ``prompts`` use it from now on (vision_cache.py).

        What is found in ``folder`` is not computed again; an interrupted run goes on. ``told`` hears how many pictures are done.
        Processes that share the work: each calls it with a part of the pictures and its own ``writer``, and when all are done
        again with none, which finds the files of the others. An encoder that reads no pictures does nothing.
        """

    def state(self) -> dict[str, Tensor]:
        """What must be saved beside the base model: every weight that is trained. On the CPU."""
        return {name: value.detach().cpu() for name, value in self.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``state`` gave. Raises ContractError where names or shapes are not this encoder's."""
        mine = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        wanted = self.state()
        if wrong := sorted(set(wanted) ^ set(state)):
            raise ContractError(
                f"saved encoder: {wrong[0]} is {'missing' if wrong[0] in wanted else 'unknown'} ({len(wrong)} such weights): "
                "it was saved with another encoder, lora_rank or frozen_layers; load it with the configuration that stands beside it"
            )
        for name, value in state.items():
            if mine[name].shape != value.shape:
                raise ContractError(
                    f"saved encoder: {name} has shape {tuple(value.shape)}, this encoder's has {tuple(mine[name].shape)}: "
                    "load it with the configuration that stands beside it"
                )
            mine[name].copy_(value)

    def save_files(self, folder: Path) -> None:
        """Files that a saved model needs beyond ``state``; ``make_encoder(..., saved=folder)`` reads them. Most need none."""


def make_encoder(
    settings: Settings,
    texts: Iterable[str] = (),
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    saved: Path | None = None,
) -> Encoder:
    """The encoder of these settings, on ``device``. Its first weights follow from settings, texts and seed alone.

    ``texts`` are read by ``tiny``, which learns its tokens from them; with ``saved``, a folder that ``save_files`` filled, it takes
    these. ``precision``: "bf16" keeps weights that are not trained in bf16 on a GPU; autocast is the caller's.
    """
    device = torch.device(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if settings.encoder == "tiny":
            from utgrec.tokenizer.tiny import make_tiny

            encoder: Encoder = make_tiny(settings, texts, device=device, precision=precision, saved=saved)
        elif settings.encoder == "text":
            from utgrec.tokenizer.sentence import load_sentence_encoder

            encoder = load_sentence_encoder(settings, device=device, precision=precision)
        else:
            from utgrec.tokenizer.qwen import load_qwen

            encoder = load_qwen(settings, device=device, precision=precision)
    return encoder.to(device)


def content_tokens(tokenizer: Any, texts: Sequence[str], most: int) -> list[np.ndarray]:
    """Tokens (int32) of texts, cut at ``most``. What steers a model (``<|im_end|>``, ``[SEP]``) is left out where a text has it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # as a tokenizer's files may ask for
    backend.no_padding()
    steering = np.array(sorted(set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}))
    found = [np.array(one.ids, np.int32) for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    return [tokens_T[~np.isin(tokens_T, steering)][:most] for tokens_T in found]


def longest_tokens(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor]:
    """tokens int64 [B, S], filled up at the right, and lengths [B]."""
    lengths_B = np.array([len(prompt) for prompt in prompts])
    tokens_BS = np.full((len(prompts), lengths_B.max()), pad, np.int64)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt.tokens_S
    return torch.from_numpy(tokens_BS), torch.from_numpy(lengths_B)


def groups_of_like_length(lengths_B: np.ndarray, fee: float) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...]]:
    """Rows from the longest to the shortest, and the cuts into groups (first, end, length) that make the least padding.

    ``fee``: tokens that a group more costs.
    """
    order_B = np.argsort(-lengths_B, kind="stable")
    sorted_B = lengths_B[order_B]
    cost, first = np.zeros(len(order_B) + 1), np.zeros(len(order_B) + 1, np.int64)
    for end in range(1, len(order_B) + 1):
        starts = np.arange(end)
        costs = cost[:end] + (end - starts) * sorted_B[:end] + fee
        first[end] = costs.argmin()
        cost[end] = costs[first[end]]
    cuts, end = [], len(order_B)
    while end:
        start = int(first[end])
        cuts.append((start, end, int(sorted_B[start])))
        end = start
    return order_B, tuple(reversed(cuts))


def at_codes(hidden_BSD: Tensor, lengths_B: Tensor, levels: int) -> Tensor:
    """The states at the last ``levels`` tokens of each row [B, L, D]."""
    places_BL = lengths_B[:, None] - levels + torch.arange(levels, device=lengths_B.device)
    return hidden_BSD.gather(1, places_BL[:, :, None].expand(-1, -1, hidden_BSD.size(-1)))
