"""``harness dry-run METHOD/CONFIG``: what a method would do on a suite, said by the method itself.

In: a method with a ``dry_run.py``, a configuration, a suite. The program gets on its standard input what the harness knows, as JSON:

    title, configuration, stages, device, devices, precision, memory (bytes a device, or null)
    domains, pretrain       name, users, items, train_interactions of each

Out: what the program says. Domains that are prepared are counted; of others the published counts are taken (harness/data/cards), the
middle where only rounded ones are published. Nothing is downloaded, prepared or trained.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from rich.console import Console

from harness.data.expected import expected_card
from harness.method import find_methods
from harness.paths import Paths
from harness.suite import GIB, load_suite
from harness.values import ConfigError, nearest

PROGRAM = "dry_run.py"


@dataclasses.dataclass(frozen=True)
class Counts:
    name: str
    users: int
    items: int
    train_interactions: int
    published: bool = False


def dry_run(name: str, suite_name: str, paths: Paths, console: Console, *, device: str, devices: int, memory_gib: float | None) -> int:
    """The exit status. Raises ConfigError for an unknown method, configuration, suite or domain."""
    methods, (method_name, _, config_name) = find_methods(paths), name.partition("/")
    if method_name not in methods:
        raise ConfigError(f"no method {method_name!r}.{nearest(method_name, methods)}")
    method, suite = methods[method_name], load_suite(suite_name)
    config = method.config(config_name or next(iter(method.configs)))
    program = method.folder / PROGRAM
    if not program.is_file():
        raise ConfigError(f"{method.name} has no {PROGRAM}: it cannot say what it would do; `harness plan` shows its runs")
    found = {domain: count(domain, paths) for domain in dict.fromkeys((*suite.pretrain, *suite.domains))}

    def told(domains: tuple[str, ...]) -> list[dict[str, object]]:
        keys = ("name", "users", "items", "train_interactions")
        return [{key: getattr(found[domain], key) for key in keys} for domain in domains]

    request = {
        "title": f"{config.title} on {suite.title}, {devices} x {device}, {suite.precision}",
        "configuration": config.values,
        "stages": [stage.name for stage in config.stages],
        "domains": told(suite.domains),
        "pretrain": told(suite.pretrain),
        "device": device,
        "devices": devices,
        "precision": suite.precision,
        "memory": None if memory_gib is None else int(memory_gib * GIB),
    }
    status = subprocess.run([sys.executable, program], input=json.dumps(request), text=True, check=False).returncode
    if published := [counts.name for counts in found.values() if counts.published]:
        console.print(f"Published counts, because it is not prepared here: {', '.join(published)}.", highlight=False, soft_wrap=True)
    return status


def count(name: str, paths: Paths) -> Counts:
    """What a domain holds, or what it will hold once it is prepared."""
    file = paths.public(name) / "domain.json"
    if file.exists():
        of = json.loads(file.read_text("utf-8"))["counts"]
        return Counts(name, of["users"], of["items"], of["train_interactions"])
    card = expected_card(name)
    if card is None:
        raise ConfigError(f"domain {name!r}: neither prepared ({file} is missing) nor among those with published counts; prepare it first")
    of = {key: sum(between) // 2 for key, between in card.get("between", {}).items()} | card["counts"]
    return Counts(name, of["users"], of["items"], of["interactions"] - 2 * of["users"], published=True)  # two a user are held out
