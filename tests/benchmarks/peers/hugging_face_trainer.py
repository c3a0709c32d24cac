"""The peer of our training step: Hugging Face's Trainer with T5ForConditionalGeneration, set up as well as we can.

Rows are tokenised beforehand and padded to the longest row of their batch (dynamic padding); the optimiser is fused AdamW;
nothing is logged, evaluated, saved or clipped while the clock runs; attention is the faster of ``sdpa`` and ``eager`` on
the device at hand (on CPU they cost the same: attention dropout and a bias with a gradient send ``sdpa`` to its plain path).
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from utgrec.recommender.model import PAD, T5, Shape, hugging_face_config, to_hugging_face


@dataclass
class Curve:
    """What a training run of either side leaves: one value a step (the clocks from the end of the step before)."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


class Clock(TrainerCallback):
    """When each step ended. A GPU is waited for at the first and the last only, so that it can run ahead between them."""

    def __init__(self, device: str, steps: int):
        self.device, self.steps, self.ends = device, steps, list[tuple[float, float]]()

    def tick(self) -> None:
        if self.device == "cuda" and len(self.ends) in (0, self.steps - 1):
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tick()

    def curve(self, losses: list[torch.Tensor]) -> Curve:
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        return Curve([float(loss) for loss in losses], *([after[i] - before[i] for before, after in pairs] for i in (0, 1)))


class LossKeeper(Trainer):
    """The Trainer as it is; the loss of each step is kept as a tensor, which costs nothing."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.kept.append(loss.detach())
        return loss


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.tensor([tokens + [PAD] * (longest - len(tokens)) for tokens, _ in rows])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": torch.tensor([codes for _, codes in rows])}


def train(
    model: T5,
    rows: list[tuple[list[int], list[int]]],
    *,
    batch: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    precision: str = "fp32",
    device: str = "cpu",
    attention: str = "sdpa",
    sampling: str = "sequential",
    compiled: bool = False,
) -> Curve:
    """One pass over ``rows`` (tokens, codes) in their order, starting from the weights of ``model``."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = hugging_face_model(model.shape, attention)
    theirs.load_state_dict({name: value.detach().clone() for name, value in to_hugging_face(model).items()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=0.0,
            train_sampling_strategy=sampling,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            logging_nan_inf_filter=False,  # it would wait for the GPU in every step
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0 if device == "cpu" else 4,  # two cores have nothing to spare
            bf16=precision == "bf16",
            use_cpu=device == "cpu",
            torch_compile=compiled,
        )
        clock = Clock(device, len(rows) // batch)
        trainer = LossKeeper(theirs, arguments, data_collator=collate, train_dataset=rows, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.kept = []
        trainer.train()
    return clock.curve(trainer.kept)


def hugging_face_model(shape: Shape, attention: str) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(**hugging_face_config(shape), attn_implementation=attention))
