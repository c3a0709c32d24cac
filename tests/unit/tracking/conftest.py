"""One real MLflow server for all tests of publishing; each test has a suite, so an experiment, of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from harness import mlflow_server
from tests.unit.tracking.examples import Local


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """Started as the product starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        results = tmp_path_factory.mktemp("server")
        with contextlib.closing(mlflow_server.ensure(results)) as started:
            yield Local(started.uri, results / "mlflow")


@pytest.fixture
def server(running: Local, monkeypatch: pytest.MonkeyPatch) -> Local:
    """The server, configured by ``MLFLOW_TRACKING_URI``."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.uri)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return running


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)
