"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.web_server import web_server

__all__ = ["shared_data", "web_server"]


MOST_AT_ONCE = 4
"""Tests that run beside each other with ``-n auto``: some time what they do, and some take gigabytes."""


def pytest_configure(config: pytest.Config) -> None:
    # A test run in the background of a script is started with Ctrl-C ignored, and so would be what it starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, "maxschedchunk", 1) is None:
        config.option.maxschedchunk = 1  # whoever is free takes the next test, not the next hundred


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, the slow ones go first: none is left alone with one of them at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data, or skip: ``../shared/data`` beside the checkout, or what HARNESS_SHARED names."""
    shared = Path(os.environ.get("HARNESS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (shared / "data").is_dir():
        pytest.skip(f"no real data at {shared / 'data'} (HARNESS_SHARED names another folder)")
    return shared / "data"
