"""`harness new-baseline NAME`: copy the template. In: a name. Out: a folder that runs and passes `harness check`."""

from __future__ import annotations

import re
import shutil

from rich.console import Console

from harness.method import IGNORED_PARTS, find_methods, load_method
from harness.paths import PROJECT, Paths
from harness.values import ConfigError

TEMPLATE = PROJECT / "baselines" / "_template"


def create(name: str, console: Console) -> int:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"{name!r}: a method's name has lower case letters, digits and _, and starts with a letter")
    folder = PROJECT / "baselines" / name
    if folder.exists() or name in find_methods(Paths.default(), broken={}):
        raise ConfigError(f"a method named {name!r} exists already; take another name")
    temporary = folder.with_name(f".{name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(TEMPLATE, temporary, ignore=shutil.ignore_patterns(*IGNORED_PARTS))
    for path in temporary.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".txt"):
            text = path.read_text()
            path.write_text(text.replace("_template", name).replace("Template", name.replace("_", " ").title()).replace("template", name))
    temporary.rename(folder)
    load_method(folder, PROJECT)
    shown = folder.relative_to(PROJECT)
    console.print(f"{shown} is there and works as it is. Next:")
    for step in (
        f"edit {shown}/run.py and {shown}/method.toml",
        f"harness check {name}",
        f"harness run --suite smoke -m {name}",
        "harness table --suite smoke",
    ):
        console.print(f"    {step}", highlight=False)
    return 0
