"""The examples in the docstrings of modules and models run."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import mmkernels.models
import mmkernels.nn


@pytest.mark.parametrize("package", [mmkernels.nn, mmkernels.models], ids=["nn", "models"])
def test_examples(package: ModuleType) -> None:
    tried = 0
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, info.name
        tried += result.attempted
    assert tried > 10
