"""Settings that all tests share."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("mmkernels", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mmkernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
