"""UTGRec on a user's own items and histories, with a trained model; no benchmark around it.

    python -m utgrec tokenize items.parquet --tokenizer FOLDER --out ids.parquet
    python -m utgrec recommend histories.parquet --ids ids.parquet --model FOLDER --out lists.parquet

Items: a table (.parquet, .csv or .jsonl) with ``item_id``, the text as ``text`` or as parts of it (``title``, ``features``, ``categories``,
``description``, ``brand``), and perhaps ``picture``, the path of an image file, relative to the table. Histories: ``user_id`` and
``item_ids``, oldest first. Both models are folders that runs leave: ``tokenizer/`` of the stages "pretrain_tokenizer" and "adapt",
``model/`` of "fit" where the configuration says ``keep_model = true``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from harness.contract import ContractError, Ragged
from utgrec.recommender.checkpoint import open_model
from utgrec.recommender.data import Histories
from utgrec.recommender.decode import recommend as decode
from utgrec.recommender.processes import Processes
from utgrec.recommender.trie import Trie
from utgrec.semantic_ids import IdsError, SemanticIds
from utgrec.tokenizer import saved
from utgrec.tokenizer.data import Catalogue
from utgrec.tokenizer.encode import semantic_ids

PARTS = ("title", "brand", "features", "categories", "description")
HEAD = b"semantic_ids"
"""Key of the parquet file's metadata: widths and books of the positions."""

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Tokenize items and recommend with a trained UTGRec."
)
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


@app.command()
def tokenize(
    items: Annotated[Path, typer.Argument(help="Table of items: item_id, text (or title, description, ...), picture.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of a trained tokenizer.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: item_id, codes.")] = Path("ids.parquet"),
    device: Device = "cpu",
) -> None:
    """Give every item its semantic id.

    Example:
      python -m utgrec tokenize items.parquet --tokenizer tokenizer --out ids.parquet
    """
    table = read_table(items, ("item_id",))
    model = saved.load(tokenizer, device=device)
    catalogue = Catalogue([Items(items, table)], model.encoder, model.settings, seed=0, to_train=False)  # type: ignore[list-item]
    ids = semantic_ids(model, catalogue, 0, Processes(torch.device(device)))
    write_ids(out, table["item_id"].astype(str).tolist(), ids)
    report = ids.report
    typer.echo(
        f"{out}: {ids.n_items:,} ids of {ids.length} codes; {report['collision_rate']:.1%} of the items collided before repair, "
        f"{report['items_moved']:,} were moved"
    )


@app.command()
def recommend(
    histories: Annotated[Path, typer.Argument(help="Table of histories: user_id, item_ids (oldest first).")],
    ids: Annotated[Path, typer.Option(help="What `tokenize` wrote for the catalogue.")],
    model: Annotated[Path, typer.Option(help="Folder of a trained recommender.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: user_id, item_ids, scores.")] = Path("lists.parquet"),
    k: Annotated[int, typer.Option(help="Items a user.")] = 10,
    beams: Annotated[int, typer.Option(help="Width of the beam search.")] = 50,
    device: Device = "cpu",
) -> None:
    """Rank the catalogue for every user: the k best items and their log-probabilities.

    Example:
      python -m utgrec recommend histories.parquet --ids ids.parquet --model model --k 10
    """
    table, (item_ids, of) = read_table(histories, ("user_id", "item_ids")), read_ids(ids)
    t5, user_tokens = open_model(model, of)
    number = {item: row for row, item in enumerate(item_ids)}
    lists = [[number.get(str(item), -1) for item in items] for items in table["item_ids"]]
    for user, numbers, items in zip(table["user_id"], lists, table["item_ids"], strict=True):
        if not numbers:
            raise ContractError(f"{histories}: user {user} has no history; leave the row out, or give at least one item")
        if -1 in numbers:
            raise ContractError(f"{histories}: user {user} has item {items[numbers.index(-1)]!r}, which is not in {ids}; tokenize it first")
    offsets = np.concatenate([[0], np.cumsum([len(numbers) for numbers in lists])]).astype(np.int64)
    ragged = Ragged(np.array([number for numbers in lists for number in numbers], np.int32), offsets).last(20)
    read = Histories(ragged, of, np.arange(len(lists)), user_tokens=user_tokens)
    found = decode(t5.to(device).eval(), Trie.of(of, device), read, k=k, beams=max(k, beams))
    kept_UK = found.items_UK >= 0
    rows = [[item_ids[item] for item in items[kept]] for items, kept in zip(found.items_UK, kept_UK, strict=True)]
    scores = [of[kept].tolist() for of, kept in zip(found.scores_UK, kept_UK, strict=True)]
    pq.write_table(pa.table({"user_id": table["user_id"].astype(str).tolist(), "item_ids": rows, "scores": scores}), out)
    typer.echo(f"{out}: {k} items for each of {len(lists):,} users")


# ------------------------------------------------------------------------------------------------------------- files


class Items:
    """A table of items as the tokenizer reads a domain: texts and pictures by number."""

    def __init__(self, path: Path, table: pd.DataFrame):
        self.path, self.table, self.name, self.n_items = path, table, path.stem, len(table)
        self.info = {"digest": str(pd.util.hash_pandas_object(table.astype(str), index=False).sum())}
        columns = ["text"] if "text" in table else [part for part in PARTS if part in table]
        if not columns:
            raise ContractError(f"{path}: no column 'text', and none of {', '.join(PARTS)}; it has {', '.join(table.columns)}")
        joined = table[columns].map(_words).agg(lambda row: " ".join(part for part in row if part), axis=1)
        self.texts = joined.tolist()

    @property
    def pictures(self) -> Items:
        return self

    def __getitem__(self, item: int) -> bytes | None:
        where = self.table["picture"].iloc[item] if "picture" in self.table else None
        if not isinstance(where, str) or not where:
            return None
        try:
            return (self.path.parent / where).read_bytes()
        except OSError as error:
            raise ContractError(f"{self.path}: picture of item {self.table['item_id'].iloc[item]}: {error}") from error


def _words(value: Any) -> str:
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(map(str, value))
    return "" if value is None or value != value else str(value)


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False)}
    if path.suffix not in readers:
        raise ContractError(f"{path}: use one of {', '.join(readers)}")
    try:
        table = readers[path.suffix](path)
    except (OSError, ValueError) as error:
        raise ContractError(f"{path}: cannot be read: {error}") from error
    if missing := [name for name in columns if name not in table]:
        raise ContractError(f"{path}: no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ContractError(f"{path}: no rows")
    if (twice := table[columns[0]].astype(str).duplicated()).any():
        raise ContractError(f"{path}: {columns[0]} {table[columns[0]][twice].iloc[0]!r} stands twice")
    return table


def write_ids(path: Path, item_ids: list[str], ids: SemanticIds) -> None:
    head = json.dumps({"widths": ids.widths, "books": ids.books, "digest": ids.digest})
    table = pa.table({"item_id": item_ids, "codes": pa.array(ids.codes_IL.tolist(), pa.list_(pa.int32()))})
    pq.write_table(table.replace_schema_metadata({HEAD: head}), path)


def read_ids(path: Path) -> tuple[list[str], SemanticIds]:
    try:
        table = pq.read_table(path)
        head = json.loads((table.schema.metadata or {})[HEAD])
        ids = SemanticIds(np.array(table["codes"].to_pylist()), tuple(head["widths"]), tuple(head["books"]))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ContractError(f"{path}: no file of semantic ids; make it with `python -m utgrec tokenize` ({error})") from error
    if ids.digest != head["digest"]:
        raise ContractError(f"{path}: its codes were changed; make it again with `python -m utgrec tokenize`")
    return table["item_id"].to_pylist(), ids


def main() -> None:
    try:
        app(standalone_mode=True)
    except (ContractError, IdsError) as error:
        raise SystemExit(f"utgrec: {error}") from None


if __name__ == "__main__":
    main()
