"""Vision-language models beside transformers on "sdpa": encoders, prefill, a training step, a second turn, a video.

The widths are published ones, the weights random: models_cases.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from models_cases import CASES
from models_measure import Row, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, compile_only, quick = option("device"), option("compile_only"), option("quick")
    rows = [Row(case, dtype, device, compile_only, quick) for case in CASES for dtype in option("dtypes").split(",")]
    metafunc.parametrize("row", rows, ids=str)


def test_models(benchmark: Any, row: Row) -> None:
    measure(benchmark, row)
