"""Other people's models after `mmkernels.patch`, beside their own fastest way: forward passes and training steps.

The widths are published ones, the weights random: integrations_models.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from integrations_measure import Row, measure
from integrations_models import CASES

transformers.logging.set_verbosity_error()  # else each change of attention warns of parts without the interface


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    device, compile_only, quick = option("device"), option("compile_only"), option("quick")
    rows = [Row(case, dtype, device, compile_only, quick) for case in CASES for dtype in option("dtypes").split(",")]
    metafunc.parametrize("row", rows, ids=str)


def test_integrations(benchmark: Any, row: Row) -> None:
    measure(benchmark, row)
