"""What a configuration of UTGRec would do, before anything is downloaded, prepared or trained: ``harness dry-run utgrec/paper``.

In: a request of the harness, JSON on the standard input (``Request``). Out: a table on the standard output: for each stage its
examples and steps, and the memory that training the tokenizer needs on a device (memory.py).

Of a model that is not on this machine the shapes are those of ``SHAPES``. Models are made without weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.contract import ContractError
from utgrec.base_model import find_model
from utgrec.recommender.model import T5
from utgrec.recommender.processes import Processes
from utgrec.run import settings_of
from utgrec.tokenizer import memory
from utgrec.tokenizer.encoder import Encoder, make_encoder
from utgrec.tokenizer.model import Latents, UniversalTokenizer
from utgrec.tokenizer.qwen import QwenEncoder
from utgrec.tokenizer.settings import Settings

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": {
        "text_config": {
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
        "image_token_id": 151_655,
    }
}
"""As their config.json says."""
TOKENS = 151_657
"""Of the tokenizer of every Qwen2-VL, those that steer it included."""
WORDS = 64
"""What a prompt has around text and picture, about."""
LATENTS = Latents(256, 16)
"""Of MAR's KL-16."""


@dataclass(frozen=True)
class Counts:
    """Of a domain."""

    name: str
    users: int
    items: int
    train_interactions: int

    @property
    def rows(self) -> int:
        """What a recommender learns to write: every training interaction but a user's first."""
        return self.train_interactions - self.users


@dataclass(frozen=True)
class Request:
    """What the harness knows (harness/commands/dry_run.py)."""

    title: str
    configuration: Mapping[str, Any]
    stages: tuple[str, ...]
    domains: tuple[Counts, ...]
    pretrain: tuple[Counts, ...]
    device: str
    devices: int
    precision: str
    memory: int | None
    """Bytes that a device has."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Request:
        counts = {name: tuple(Counts(**one) for one in raw[name]) for name in ("domains", "pretrain")}
        return cls(**{**raw, **counts, "stages": tuple(raw["stages"])})


@dataclass(frozen=True)
class Work:
    """A stage: what it learns from, how often, in how many steps."""

    stage: str
    domains: tuple[Counts, ...]
    model: str
    examples: int
    epochs: int
    batch: int
    trained: int
    """Numbers that are trained."""

    @property
    def unit(self) -> str:
        return "items" if self.model == "tokenizer" else "rows"

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.examples // self.batch)


@dataclass(frozen=True)
class Plan:
    title: str
    work: tuple[Work, ...]
    memory: memory.Estimate
    there: int | None
    """Bytes of a device, if known."""
    problem: str
    """Why it does not fit, and what would; empty if it does."""
    assumed: tuple[str, ...]
    """What is not known on this machine, and was taken from elsewhere."""


def make_plan(request: Request) -> Plan:
    """Raises ContractError for a configuration that is none, or a model that nobody knows."""
    tokenizer, recommender, pretraining = settings_of(request.configuration)
    assumed: list[str] = []
    with torch.device("meta"):
        model = UniversalTokenizer(tokenizer, _encoder(tokenizer, torch.device(request.device), request.precision, assumed), LATENTS)
        codes = sum(width for level, width in enumerate(tokenizer.widths) if tokenizer.books.index(tokenizer.books[level]) == level)
        t5 = _trained(T5(recommender.shape(codes)))
    trained, work, before = _trained(model), [], request.pretrain
    if "pretrain_tokenizer" in request.stages:
        items = sum(counts.items for counts in before)
        work.append(Work("pretrain_tokenizer", before, "tokenizer", items, tokenizer.tokenizer_epochs, tokenizer.tokenizer_batch, trained))
    if "pretrain_recommender" in request.stages:
        rows = sum(counts.rows for counts in before)
        work.append(Work("pretrain_recommender", before, "T5", rows, pretraining.pretrain_epochs, recommender.batch, t5))
    for target in request.domains:
        if "pretrain_tokenizer" not in request.stages or tokenizer.adapt != "none":
            work.append(Work("adapt", (target,), "tokenizer", target.items, tokenizer.adapt_epochs, tokenizer.tokenizer_batch, trained))
        work.append(Work("fit", (target,), "T5", target.rows, recommender.epochs, recommender.batch, t5))
    longest = tokenizer.text_tokens * tokenizer.use_text + tokenizer.pixels_max * tokenizer.use_pictures + WORDS + tokenizer.levels
    processes = Processes(torch.device(request.device), 0, request.devices)
    needed = memory.estimate(model, tokenizer, processes, request.precision, longest)
    problem = memory.refusal(needed, tokenizer, request.memory, "a device") if request.memory is not None else ""
    return Plan(request.title, tuple(work), needed, request.memory, problem, tuple(assumed))


def _trained(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def _encoder(settings: Settings, device: torch.device, precision: str, assumed: list[str]) -> Encoder:
    """Without weights. The small ones are made as they are: they need nothing that is not here."""
    if settings.encoder != "qwen2-vl":
        from transformers.utils import logging

        logging.disable_progress_bar()
        with torch.device("cpu"):
            encoder = make_encoder(settings, [settings.encoder])
        return encoder.to("meta")
    from transformers import AutoConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(find_model(settings.model, settings.revision)[0], local_files_only=True)
    except ContractError:
        if settings.model not in SHAPES:
            raise
        assumed.append(f"the shapes of {settings.model} that utgrec/dry_run.py knows: the model is not on this machine")
        config = Qwen2VLConfig(**SHAPES[settings.model])
    model = Qwen2VLForConditionalGeneration(config)
    about = {"model": settings.model, "revision": settings.revision, "digest": ""}
    return QwenEncoder(model, Tokens(config.image_token_id), settings, about=about, device=device, precision=precision)


class Tokens:
    """As much of a tokenizer of Qwen2-VL as its shapes follow from."""

    added_tokens_decoder: dict[int, str] = {}
    pad_token_id = 0

    def __init__(self, picture: int):
        self.picture = picture

    def __len__(self) -> int:
        return TOKENS

    def convert_tokens_to_ids(self, _: str) -> int:
        return self.picture

    def apply_chat_template(self, turns: list[dict[str, Any]], **_: Any) -> str:
        *pictures, text = turns[0]["content"]
        return "<|image_pad|>" * len(pictures) + str(text["text"])

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.picture] * text.count("<|image_pad|>") + [0]}


# -------------------------------------------------------------------------------------------------------------- to read


def show(plan: Plan) -> None:
    """On the terminal: a row a stage, then the memory, then what was assumed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Dry run: {plan.title}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("stage", "of"):
        table.add_column(name, no_wrap=True)
    for name in ("examples", "epochs", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for work in plan.work:
        of = work.domains[0].name if len(work.domains) == 1 else f"{len(work.domains)} domains"
        table.add_row(work.stage, of, f"{work.examples:,}", f"{work.epochs}", f"{work.steps:,}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for work in {work.model: work for work in plan.work}.values():
        console.print(f"{work.model}: {work.trained:,} trained numbers, {work.batch} {work.unit} a step.")
    console.print(f"Memory to train the tokenizer: {plan.memory}, about.")
    if plan.there is not None:
        console.print(plan.problem or f"It fits into {plan.there / memory.GIB:.2f} GiB a device.")
    for line in plan.assumed:
        console.print(f"Assumed: {line}.")
    console.print("Steps at most: items without a training interaction do not count, budget and early stopping end a stage sooner.")


if __name__ == "__main__":
    try:
        show(make_plan(Request.of(json.load(sys.stdin))))
    except ContractError as error:
        raise SystemExit(str(error)) from None
