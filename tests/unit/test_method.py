"""Methods: strict ``method.toml``, inheritance, discovery, and what enters the hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.method import Method, find_methods, load_method
from harness.paths import PROJECT, Paths
from harness.values import ConfigError

GOOD = """
name = "toy"
title = "Toy"
lineage = "trivial"
[configs.base]
width = 8
needs = ["text"]
[configs.wide]
extends = "base"
title = "Wide toy"
width = 16
"""


def make(root: Path, text: str = GOOD, name: str = "toy") -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "method.toml").write_text(text)
    (folder / "run.py").write_text("print('hello')\n")
    return folder


def load(root: Path, text: str = GOOD) -> Method:
    return load_method(make(root, text), PROJECT)


def test_a_configuration_inherits_and_overrides(tmp_path: Path) -> None:
    method = load(tmp_path)
    assert method.config("wide").values == {"width": 16}
    assert method.config("wide").needs == ("text",)
    assert (method.config("base").title, method.config("wide").title) == ("Toy (base)", "Wide toy")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lineage", "lineag"), "unknown key 'lineag'. Did you mean 'lineage'?"),
        (('lineage = "trivial"', 'lineage = "new"'), "lineage"),
        (('extends = "base"', 'extends = "bas"'), "Did you mean 'base'?"),
        (('extends = "base"', 'extends = "wide"'), "circle"),
        (('name = "toy"', 'name = "other"'), "the folder is 'toy'"),
        (('needs = ["text"]', 'needs = ["sound"]'), "configs.base.needs"),
        (('needs = ["text"]', 'stages = ["fitt"]'), "Did you mean 'fit'?"),
        (("[configs.base]", '[[stages]]\nname = "a"\n[[stages]]\nname = "fit"\ninputs = ["b"]\n[configs.base]'), "stages.fit: inputs: 'b'"),
        (("[configs.base]", '[[stages]]\nname = "fit"\ninputs = ["fit"]\n[configs.base]'), "no stage before it"),
        (("[configs.base]", 'program = "walk.py"\n[configs.base]'), "walk.py"),
        (("[configs.base]", 'sources = ["harness/score.py"]\n[configs.base]'), "sources"),
        (("[configs.base]", "[suites]\nsmoke = ['wode']\n[configs.base]"), "Did you mean 'wide'?"),
        (("width = 8", "width = "), "not valid TOML"),
    ],
)
def test_an_error_names_file_key_and_mend(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD.replace(*change, 1))
    assert "method.toml" in str(error.value) and words in str(error.value)


def test_a_domain_can_have_several_published_values(tmp_path: Path) -> None:
    table = '[[reference.beauty]]\nconfigs = ["{0}"]\nmetrics = {{recall_at_10 = {1}}}\nsource = "s"\n'
    method = load(tmp_path, GOOD + table.format("base", 0.1) + table.format("wide", 0.2))
    assert [method.reference("beauty", name).metrics["recall_at_10"] for name in ("base", "wide")] == [0.1, 0.2]
    assert method.reference("toys", "base") is None
    single = load(tmp_path, GOOD + '[reference.beauty]\nmetrics = {recall_at_10 = 0.3}\nsource = "s"\n')
    assert single.reference("beauty", "wide").metrics == {"recall_at_10": 0.3}


def test_an_unknown_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wide'"):
        load(tmp_path).config("wid")


def test_the_hash_follows_the_code_and_neither_texts_nor_caches(tmp_path: Path) -> None:
    method = load(tmp_path)
    first = method.source_hash(PROJECT)
    (method.folder / "__pycache__").mkdir()
    (method.folder / "__pycache__" / "run.cpython-311.pyc").write_bytes(b"x")
    (method.folder / "README.md").write_text("words\n")
    (method.folder / "method.toml").write_text(GOOD + "[configs.third]\n")
    assert method.source_hash(PROJECT) == first
    (method.folder / "helper.py").write_text("x = 1\n")
    assert method.source_hash(PROJECT) != first


def test_one_broken_folder_does_not_hide_the_others(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, "name = ", "broken")
    make(tmp_path, GOOD.replace('"toy"', '"template"'), "_template")
    paths = Paths(PROJECT, tmp_path, tmp_path, (tmp_path,))
    broken: dict[str, ConfigError] = {}
    assert set(find_methods(paths, broken=broken)) - {"utgrec"} == {"toy"}
    assert set(broken) == {"broken"}
    with pytest.raises(ConfigError):
        find_methods(paths)


def test_every_method_of_the_project_loads_and_has_a_readme() -> None:
    methods = find_methods(Paths.default())
    assert {"popularity", "last_item", "recbole"} <= set(methods)
    for method in methods.values():
        assert (method.folder / "README.md").exists(), method.name
