"""transformers' models on ``attn_implementation="mmkernels"`` beside "sdpa": forward passes, and the attention in them.

The widths are published ones, the weights random: transformers_models.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers_measure import Row, measure
from transformers_models import MODELS

transformers.logging.set_verbosity_error()  # else each change of attention warns of parts without the interface


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, compile_only = option("device"), option("compile_only")
    rows = [Row(model, dtype, device, compile_only) for dtype in option("dtypes").split(",") for model in MODELS]
    metafunc.parametrize("row", rows, ids=str)


def test_transformers(benchmark: Any, row: Row) -> None:
    measure(benchmark, row)
