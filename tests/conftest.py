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


def pytest_configure() -> None:
    """A test run in the background of a script is started with Ctrl-C ignored, and so would be what it starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests (``-n auto --dist loadgroup``): a file's tests stay together and in order, but for the
    checks of methods, which take minutes each; and files with slow tests go first, so that none is left alone with them at the end."""
    if not hasattr(config, "workerinput"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.path.name != "test_methods.py":
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(config.rootpath))))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data, or skip: ``../shared/data`` beside the checkout, or what HARNESS_SHARED names."""
    shared = Path(os.environ.get("HARNESS_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (shared / "data").is_dir():
        pytest.skip(f"no real data at {shared / 'data'} (HARNESS_SHARED names another folder)")
    return shared / "data"
