"""Find and load methods: folders with a ``method.toml``.

In: the project's paths. Out: ``Method`` values with resolved configurations and a hash of everything in the method's
folder and its declared ``sources``. An unknown key, stage or configuration is an error that names the nearest right one.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from harness.paths import Paths
from harness.values import ConfigError, Frozen, build, nearest, read_toml

Need = Literal["text", "pictures", "cuda"]
RESERVED = ("title", "extends", "needs", "stages", "paper")
"""Keys of a ``[configs.NAME]`` table that are not hyper-parameters."""
CONTRACT = Path(__file__).parent / "contract.py"
IGNORED_PARTS = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".git", ".DS_Store"}


class Stage(Frozen):
    """A part of a run that is cached by itself. ``pretrain`` stages get all pre-training domains of the suite."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    scope: Literal["domain", "pretrain"] = "domain"
    uses: tuple[str, ...] | None = None
    """The hyper-parameters that force this stage to run again; default all. Configurations equal in these share it."""
    inputs: tuple[str, ...] | None = None
    """The earlier stages whose output it reads (``job.inputs``); default all that the configuration has."""


class PublishedValue(Frozen):
    """``[reference.DOMAIN]``: a published value to print beside ours."""

    metrics: dict[str, float]
    source: str
    configs: tuple[str, ...] | None = None
    comparable: bool = False
    note: str = ""


class MethodFile(Frozen):
    """The content of ``method.toml``."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    paper: str = ""
    lineage: Literal["official", "wrapper", "reimplementation", "trivial"]
    description: str = ""
    program: str = "run.py"
    needs: tuple[Need, ...] = ()
    protocols: tuple[Literal["loo-v1", "time-v1"], ...] = Field(("loo-v1",), min_length=1)
    """Under which it can run: it takes its rows from the contract, and under ``time-v1`` knows what to do with an empty input."""
    sources: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = (Stage(name="fit"),)
    configs: dict[str, dict[str, Any]]
    reference: dict[str, tuple[PublishedValue, ...]] = {}
    """By domain; several with ``[[reference.DOMAIN]]``, each for other configurations."""
    suites: dict[str, tuple[str, ...]] = {}
    """``[suites]``: configurations that join a suite by themselves, so that a new method needs no edit of a suite file."""

    @field_validator("reference", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (
            {name: [tables] if isinstance(tables, dict) else tables for name, tables in value.items()} if isinstance(value, dict) else value
        )

    @field_validator("configs")
    @classmethod
    def _some_config(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise ValueError("a method needs at least one configuration; add [configs.default]")
        return value


class Config(Frozen):
    """A named, resolved set of hyper-parameters."""

    name: str
    title: str
    values: dict[str, Any]
    needs: tuple[Need, ...]
    stages: tuple[Stage, ...]
    paper: str

    @property
    def pretrains(self) -> bool:
        """Whether it needs domains to pre-train on."""
        return any(stage.scope == "pretrain" for stage in self.stages)


class Method(Frozen):
    folder: Path
    file: MethodFile
    configs: dict[str, Config]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def program(self) -> Path:
        return self.folder / self.file.program

    @property
    def requirements(self) -> Path | None:
        path = self.folder / "requirements.txt"
        return path if path.exists() else None

    def source_folders(self, project: Path) -> tuple[Path, ...]:
        """The method's folder and the project modules it declares: what its process may read, and what its hash covers."""
        return (self.folder, *(project / source for source in self.file.sources))

    def source_hash(self, project: Path) -> str:
        """Everything in the method's folders that can change a result.

        Texts (``*.md``) and ``method.toml`` stay out: a configuration's values and stages enter its fit key by themselves, so a new
        configuration, title or published value beside it must not force the others to be trained again.
        """
        return hash_tree(self.source_folders(project), project, (".md", "method.toml"))

    def config(self, name: str) -> Config:
        if name not in self.configs:
            raise ConfigError(f"{self.folder / 'method.toml'}: no configuration {name!r}.{nearest(name, self.configs)}")
        return self.configs[name]

    def reference(self, domain: str, config: str) -> PublishedValue | None:
        for value in self.file.reference.get(domain, ()):
            if value.configs is None or config in value.configs:
                return value
        return None


def hash_tree(roots: tuple[Path, ...], base: Path, without: tuple[str, ...] = ()) -> str:
    """SHA-256 over the relative names and contents of all files below some folders (or of single files).

    ``without``: ends of names of files to leave out.
    """
    total = hashlib.sha256()
    for root in roots:
        for path in [root] if root.is_file() else list_files(root):
            if path.name.endswith(without):
                continue
            name = os.path.relpath(path, base if path.is_relative_to(base) else root.parent)
            total.update(f"{name}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def list_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and not IGNORED_PARTS & set(p.relative_to(root).parts) and p.suffix != ".pyc")


def load_method(folder: Path, project: Path) -> Method:
    """Read ``folder/method.toml``. Raises ConfigError with file, key and mend."""
    path = folder / "method.toml"
    file = build(MethodFile, read_toml(path), path)
    if file.name != folder.name.lstrip("_"):
        raise ConfigError(f"{path}: name = {file.name!r}, but the folder is {folder.name!r}; make them equal")
    if not (folder / file.program).is_file():
        raise ConfigError(f"{path}: program = {file.program!r}: no such file in {folder}")
    for source in file.sources:
        if not (project / source).exists() or ".." in Path(source).parts or source.split("/")[0] == "harness":
            raise ConfigError(f"{path}: sources: {source!r} is not a module of this project that a method may use")
    names = [stage.name for stage in file.stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: two stages have one name: {names}")
    for number, stage in enumerate(file.stages):
        for name in stage.inputs or ():
            if name not in names[:number]:
                raise ConfigError(f"{path}: stages.{stage.name}: inputs: {name!r} is no stage before it.{nearest(name, names[:number])}")
    configs = {name: _resolve(file, name, path) for name in file.configs}
    for key, mentioned in (
        ("suites", file.suites.values()),
        ("reference", (value.configs or () for tables in file.reference.values() for value in tables)),
    ):
        for name in (name for names in mentioned for name in names):
            if name not in configs:
                raise ConfigError(f"{path}: {key}: no configuration {name!r}.{nearest(name, configs)}")
    return Method(folder=folder, file=file, configs=configs)


def _resolve(file: MethodFile, name: str, path: Path) -> Config:
    """A configuration with everything it inherits by ``extends``."""
    chain: list[str] = []
    current: str | None = name
    while current is not None:
        if current in chain:
            raise ConfigError(f"{path}: configs.{name}: 'extends' runs in a circle: {' -> '.join([*chain, current])}")
        if current not in file.configs:
            raise ConfigError(f"{path}: configs.{chain[-1]}: extends {current!r}.{nearest(current, file.configs)}")
        chain.append(current)
        current = file.configs[current].get("extends")
    merged: dict[str, Any] = {}
    for link in reversed(chain):
        merged |= file.configs[link]
    stages = {stage.name: stage for stage in file.stages}
    wanted = merged.get("stages", list(stages))
    for stage in wanted:
        if stage not in stages:
            raise ConfigError(f"{path}: configs.{name}: stages: {stage!r}.{nearest(stage, stages)}")
    raw = {
        "name": name,
        "title": file.configs[name].get("title") or _default_title(file, name),
        "values": {key: value for key, value in merged.items() if key not in RESERVED},
        "needs": merged.get("needs", file.needs),
        "stages": [stages[stage] for stage in wanted],
        "paper": merged.get("paper", file.paper),
    }
    return build(Config, raw, path, prefix=f"configs.{name}")


def _default_title(file: MethodFile, name: str) -> str:
    return file.title if name == "default" or len(file.configs) == 1 else f"{file.title} ({name})"


def find_methods(paths: Paths, *, broken: dict[str, ConfigError] | None = None) -> dict[str, Method]:
    """All methods: every folder under ``baselines/`` with a ``method.toml``, and ``utgrec/``. Names starting with ``_`` are templates.

    A folder that cannot be loaded raises, or lands in ``broken`` when that is given (one bad folder must not stop the rest).
    """
    folders = [paths.project / "utgrec"]
    for root in paths.methods:
        folders += sorted(p for p in root.glob("*") if p.is_dir() and not p.name.startswith(("_", ".")))
    methods: dict[str, Method] = {}
    for folder in folders:
        if not (folder / "method.toml").exists():
            continue
        try:
            method = load_method(folder, paths.project)
            if method.name in methods:
                raise ConfigError(f"{folder}: a method named {method.name!r} exists already in {methods[method.name].folder}; rename one")
        except ConfigError as error:
            if broken is None:
                raise
            broken[folder.name] = error
        else:
            methods[method.name] = method
    return methods


@functools.cache
def contract_hash() -> str:
    """Of the contract as it was when this process first asked."""
    return hashlib.sha256(CONTRACT.read_bytes()).hexdigest()
