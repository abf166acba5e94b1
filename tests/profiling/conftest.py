"""Settings of the profiler's tests."""

from collections.abc import Iterator

import pytest
import torch

from mmkernels.meters import quick_collections
from mmkernels.profiling import timing


@pytest.fixture(scope="package", autouse=True)
def _short_and_steady() -> Iterator[None]:
    """Few rounds, and one thread: tiny models wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_BUDGET", 0.0)
        with quick_collections():
            yield
    torch.set_num_threads(threads)
