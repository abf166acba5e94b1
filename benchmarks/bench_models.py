"""Multimodal models beside transformers on "sdpa": encoders, prefill, training steps, a second turn, a video, sound.

The widths are published ones, the weights random: models_cases.py, models_deepseek.py, models_lxmert.py,
models_sound.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from models_cases import CASES
from models_deepseek import DEEPSEEK_CASES
from models_lxmert import LXMERT_CASES
from models_measure import Row, measure
from models_sound import SOUND_CASES

ALL = (*CASES, *LXMERT_CASES, *SOUND_CASES, *DEEPSEEK_CASES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, compile_only, quick = option("device"), option("compile_only"), option("quick")
    rows = [Row(case, dtype, device, compile_only, quick) for case in ALL for dtype in option("dtypes").split(",")]
    metafunc.parametrize("row", rows, ids=str)


def test_models(benchmark: Any, row: Row) -> None:
    measure(benchmark, row)
