"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import mmkernels

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(mmkernels.__path__, "mmkernels.")
    if not name.endswith(("__main__", "_cpu", "_cuda"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        pytest.skip("needs Triton")
    torch.manual_seed(0)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.failed == 0


def test_every_public_name_has_an_example() -> None:
    for name in mmkernels.__all__:
        thing = getattr(mmkernels, name)
        if callable(thing) and not (isinstance(thing, type) and issubclass(thing, Exception)):
            assert ">>>" in (thing.__doc__ or ""), f"mmkernels.{name} has no example"
