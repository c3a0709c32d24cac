"""Records come back as they were written; what is not a record says which file and what to do."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from harness import record
from harness.values import ConfigError


def make_record(run_id: str = "m.c.d.s1.abc") -> record.Record:
    return record.Record(
        run=record.Run(id=run_id, fit_key="f" * 64),
        method=record.Method(
            name="m", config="c", title="M", lineage="trivial", source_hash="0", configuration={"lr": 0.1, "layers": [1, 2]}
        ),
        domain=record.DomainCard(name="d", digest="e", users=1, items=1, interactions=3, train_interactions=1),
        seed=1,
        budget=record.BudgetUsed(seconds=1, memory=1, threads=1),
        status=record.Status(state="ok"),
        metrics={"recall_at_1": record.Metric(mean=1 / 3, low=0.1, high=0.9, n=7)},
        behaviour={"beams": 50, "rate": 0.25, "decoding": "free", "trie": True, "rounds": None},
        environment=record.Environment(hardware="h", cpu="c", cpus=1, memory=1),
        artefacts=(record.Artefact(path="p", sha256="s", bytes=1),),
        isolation=record.Isolation(level="landlock"),
    )


def test_a_record_comes_back_equal(tmp_path: Path) -> None:
    written = make_record()
    assert record.read_record(record.write_record(tmp_path, written)) == written
    back = record.read_record(tmp_path / f"{written.run.id}.json").behaviour
    assert {name: type(value) for name, value in back.items()} == {
        "beams": int,
        "rate": float,
        "decoding": str,
        "trie": bool,
        "rounds": type(None),
    }


@pytest.mark.parametrize("text", ["", '{"run": ', "\xff", "[]", '{"seed": NaN}'])
def test_what_is_no_record_names_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "torn.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"torn\.json"):
        record.read_record(path)


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = record.write_record(tmp_path, make_record())
    raw = json.loads(path.read_text())
    raw["status"]["raison"] = raw["status"].pop("reason")
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"status\.raison.*'reason'"):
        record.read_record(path)


def test_many_records_and_the_collector(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record.write_record(tmp_path, make_record(name))
    (tmp_path / ".c.json.1.tmp").write_text("half")
    assert gc.isenabled()
    assert set(record.read_records(tmp_path)) == {"a", "b"}
    assert set(record.read_records(tmp_path, ["b", "absent"])) == {"b"}
    (tmp_path / "c.json").write_text("half")
    with pytest.raises(ConfigError):
        record.read_records(tmp_path)
    assert gc.isenabled()
    assert record.read_records(tmp_path / "nowhere") == {}
