"""A pytest plugin, ``-p time_limit --seconds N``: what begins later than that is skipped, and says so."""

from __future__ import annotations

import time

import pytest

LEFT_OUT = "left out: the time is up"
_END = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=float("inf"), help="after which no test begins")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_END] = time.monotonic() + config.getoption("--seconds")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[_END]:
        pytest.skip(LEFT_OUT)
