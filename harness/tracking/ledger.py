"""What is already published where: ``RESULTS/mlflow/published.json``.

It answers "is there anything new?" without a server. It is a note, not the truth: it can be deleted, and ``publish``
looks at the server itself and writes it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness import mlflow_server
from harness.contract import write_json


class Ledger:
    """Digests by server, suite and key. ``server`` is an address, or None for the local one."""

    def __init__(self, results: Path, server: str | None):
        self._folder = results / "mlflow"
        self._path = self._folder / "published.json"
        self._server = mlflow_server.without_password(server) if server else "local"
        # The local server's port may change, its database stays; without it nothing is published, whatever was noted.
        self._void = server is None and not (self._folder / mlflow_server.DATABASE).exists()

    def read(self, suite: str) -> dict[str, str]:
        if self._void:
            return {}
        entries = self._load().get(self._server, {}).get(suite, {})
        return dict(entries) if isinstance(entries, dict) else {}

    def note(self, suite: str, digests: Mapping[str, str]) -> None:
        """Add digests; other processes' notes stay."""
        if not digests:
            return
        with self.lock("ledger.lock"):
            servers = self._load()
            servers.setdefault(self._server, {}).setdefault(suite, {}).update(digests)
            write_json(self._path, servers)
        self._void = False

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait for the lock of that name in the MLflow folder; a killed holder's lock is free."""
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _load(self) -> dict[str, dict[str, dict[str, str]]]:
        try:
            raw = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return raw if isinstance(raw, dict) else {}
