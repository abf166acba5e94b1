"""Vision and sound towers that attend segment by segment: in each of them, packing takes the place of the loop."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from mmkernels.integrations.transformers.packed_towers import packing_functions

LOOP = "lengths.tolist(), dim="
"""How transformers splits the tokens of a call into segments, each of which it then attends to by itself."""


def loops() -> Iterator[tuple[str, str]]:
    """Yields the modules of transformers with such a loop, and the methods that have it."""
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if LOOP in file.read_text():
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            classes = [x for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
            for method in (method for x in classes for method in vars(x).values() if inspect.isfunction(method)):
                if method.__code__.co_filename == str(file) and LOOP in inspect.getsource(method):
                    yield module.__name__, method.__qualname__


@pytest.mark.slow  # imports 35 models
def test_no_loop_over_segments_is_left() -> None:
    found = list(loops())
    assert len(found) > 20
    for name, method in found:
        assert method in {x.__qualname__ for x in packing_functions(importlib.import_module(name))}
