import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from checkpoints import Saved, save


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """variant -> its checkpoint, which is written once."""
    return cache(lambda variant: save(tmp_path_factory.mktemp(variant), variant))


@pytest.fixture
def copy(saved: Callable[[str], Saved], tmp_path: Path) -> Callable[[str], Path]:
    """variant -> a copy of its checkpoint's folder, to be changed: a new one in each call."""
    folders = (tmp_path / f"copy{number}" for number in range(100))
    return lambda variant: shutil.copytree(saved(variant).folder, next(folders))
