"""Where things lie: project, domains, results. One place, so that containers and tests can move them by environment.

``HARNESS_DATA`` (default ``data/domains``) holds domains, ``HARNESS_RESULTS`` (default ``results/local``) what runs write.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Paths:
    project: Path
    data: Path
    results: Path
    methods: tuple[Path, ...]
    """Folders whose sub-folders with a ``method.toml`` are methods."""

    @classmethod
    def default(cls) -> Paths:
        data = Path(os.environ.get("HARNESS_DATA") or PROJECT / "data" / "domains")
        results = Path(os.environ.get("HARNESS_RESULTS") or PROJECT / "results" / "local")
        extra = [Path(part) for part in os.environ.get("HARNESS_METHODS", "").split(os.pathsep) if part]
        return cls(PROJECT, data.absolute(), results.absolute(), (PROJECT / "baselines", *(path.absolute() for path in extra)))

    def domain(self, name: str) -> Path:
        return self.data / name

    def public(self, name: str) -> Path:
        return self.data / name / "public"

    def private(self, name: str) -> Path:
        return self.data / name / "private"

    @property
    def records(self) -> Path:
        return self.results / "records"

    @property
    def stages(self) -> Path:
        """Finished and interrupted stages: ``stages/METHOD/STAGE-KEY/``."""
        return self.results / "stages"

    @property
    def caches(self) -> Path:
        return self.results / "cache"

    @property
    def secret(self) -> Path:
        """Per-user ranks: the answers in another form, so mode 0700 and out of every method's sight."""
        return self.results / "private"

    @property
    def tables(self) -> Path:
        return self.results / "tables"

    @property
    def environments(self) -> Path:
        """Virtual environments of methods that bring a ``requirements.txt`` (in the image: ``HARNESS_ENVIRONMENTS``)."""
        return Path(os.environ.get("HARNESS_ENVIRONMENTS") or self.results / "environments")
