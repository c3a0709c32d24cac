"""RecBole 1.2.1 as a library: the mends it needs today, its configuration from a job, its dataset from a domain.

In: a job and its domain. Out: RecBole's ``Config`` and a ``SequentialDataset`` whose internal id of item n (and of user
n) is n + 1; 0 is padding.

RecBole is given the training part only. Validation items never enter it: the harness's rules for validation are kept
by our own loop (train.py), and what RecBole never sees it cannot learn from.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import item_features

from harness.contract import HISTORY, ContractError, Domain, Job, Ragged


def mend() -> None:
    """What RecBole needs to run beside numpy 2 and in a process whose command line is not its own."""
    for old, new in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_), ("bool8", np.bool_)):
        if not hasattr(np, old):
            setattr(np, old, new)  # its Config reads these names, gone since numpy 2
    sys.argv = sys.argv[:1]  # its Config parses the command line
    warnings.filterwarnings("ignore", category=FutureWarning)  # pandas and torch warn about its older calls
    logging.getLogger().setLevel(logging.WARNING)


mend()
# Only now, and never recbole.quick_start: that one imports ray.
from recbole.config import Config  # noqa: E402
from recbole.data.dataset import SequentialDataset  # noqa: E402
from recbole.data.interaction import Interaction  # noqa: E402
from recbole.utils import init_seed  # noqa: E402

OURS = {"model", "epochs", "eval_every", "rows", "negatives", "feature_tokens"}
"""Keys of a configuration that are read here; all others are RecBole's own."""


def make_config(job: Job, model_class: type, *, domain: Domain, **more: Any) -> Config:
    """RecBole's configuration: its defaults for the model, then the job's hyper-parameters, then what the protocol fixes."""
    hyper = {key: value for key, value in job.configuration.items() if key not in OURS}
    history = hyper.setdefault("MAX_ITEM_LIST_LENGTH", HISTORY)
    if not 1 <= history <= HISTORY:
        raise ContractError(f"MAX_ITEM_LIST_LENGTH = {history}: the protocol cuts inputs to the last {HISTORY} items; use 1..{HISTORY}")
    pairs = hyper.get("loss_type", "CE") == "BPR"  # one sampled negative a row; with CE the negatives are all items
    fixed = {
        "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length",
        "alias_of_item_id": ["item_id_list"], "benchmark_filename": ["train"], "data_path": str(job.scratch),
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "user": ["user_id"], "item": ["item_id", "class"]},
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1} if pairs else None,
        "eval_args": {"group_by": "user", "order": "TO", "mode": "full"},  # sequential models refuse another order
        # RecBole writes gpu_id into CUDA_VISIBLE_DEVICES: hand it what the harness has chosen.
        "gpu_id": os.environ.get("CUDA_VISIBLE_DEVICES", "0") if job.device == "cuda" else "", "use_gpu": job.device == "cuda",
        "enable_amp": job.precision == "bf16", "seed": job.seed % 2**32, "reproducibility": True, "worker": 0,
        "checkpoint_dir": str(job.scratch / "saved"), "show_progress": False, "epochs": job.configuration["epochs"],
    }  # fmt: skip
    package = Path(importlib.util.find_spec("recbole").origin).parent
    defaults = package / "properties" / "model" / f"{model_class.recbole_name}.yaml"
    write_files(job.scratch / "domain", domain, job.configuration.get("feature_tokens"))
    config = Config(model=model_class, dataset="domain", config_file_list=[str(defaults)], config_dict={**hyper, **fixed, **more})
    known = {*config.internal_config_dict, *config.file_config_dict, "MAX_ITEM_LIST_LENGTH"}
    for key in hyper:
        if key not in known:
            near = difflib.get_close_matches(key, known | OURS, 1)
            raise ContractError(
                f"configuration key {key!r} is not one of RecBole's {model_class.recbole_name}{f'; {near[0]!r}?' if near else ''}"
            )
    torch.set_autocast_dtype(job.device, torch.bfloat16)  # RecBole would take fp16 on a GPU
    init_seed(config["seed"], config["reproducibility"])
    return config


def write_files(folder: Path, domain: Domain, feature_tokens: int | None) -> None:
    """RecBole's atomic files, for the ids only: all users, all items in the order of their numbers, and one row.

    That row makes user 0 and item 0 the first it meets, so that every internal id is the number + 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "domain.train.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\n0\t0\t0\n")
    (folder / "domain.user").write_text("\n".join(["user_id:token", *map(str, range(domain.n_users))]) + "\n")
    lines = ["item_id:token", *map(str, range(domain.n_items))]
    if feature_tokens:
        tokens = [" ".join(map(str, own)) for own in item_features(domain, feature_tokens)]
        lines = [f"{line}\t{own}" for line, own in zip(lines, ["class:token_seq", *tokens], strict=True)]
    (folder / "domain.item").write_text("\n".join(lines) + "\n")


def make_dataset(config: Config, domain: Domain, rows: str) -> SequentialDataset:
    """The training rows as a RecBole dataset. ``rows`` says what a row is:

    - ``prefixes``: an input x_1..x_(i-1) and its target x_i, as RecBole's own augmentation makes them;
    - ``prefixes_with_target``: the same with the target at the end of the input, for models that train by masking the
      input and never look at the target column (they would never learn the last training item);
    - ``sequences``: one row a user who has one, its whole training part, for masking models that see a sequence once.
    """
    dataset = SequentialDataset(config)
    for field, count in (("user_id", domain.n_users), ("item_id", domain.n_items)):
        ids = dataset.field2token_id[field]
        if len(ids) != count + 1 or any(ids[str(n)] != n + 1 for n in range(count)):
            raise AssertionError(f"RecBole numbered {field} in another order than its files")
    dataset.field2seqlen["item_id_list"] = config["MAX_ITEM_LIST_LENGTH"]  # some models size their positions by it

    lengths = domain.train.lengths
    if rows == "sequences":
        users = np.flatnonzero(lengths)  # under time-v1 some have no training part
        inputs, targets = domain.train.take(users), domain.train.values[domain.train.offsets[1:][users] - 1]
    else:
        inputs, targets = domain.training_rows()
        users = np.repeat(np.arange(domain.n_users), np.maximum(lengths - 1, 0))
        if rows == "prefixes_with_target":
            inputs = inputs.append(targets)
        elif rows != "prefixes":
            raise ContractError(f"rows = {rows!r}: use 'prefixes', 'prefixes_with_target' or 'sequences'")
    return dataset.build()[0].copy(interaction(config, inputs, users=users, targets=targets))


def interaction(config: Config, inputs: Ragged, *, users: np.ndarray, targets: np.ndarray | None = None) -> Interaction:
    """A batch in RecBole's form: histories filled up with 0 at the right."""
    length = config["MAX_ITEM_LIST_LENGTH"]
    fields = {
        "user_id": users + 1,
        "item_id_list": inputs.padded(length) + 1,
        "item_length": np.minimum(inputs.lengths, length),
    }
    if targets is not None:
        fields["item_id"] = targets + 1
    return Interaction({name: torch.from_numpy(np.asarray(values, np.int64)) for name, values in fields.items()})
