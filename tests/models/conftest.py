from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from checkpoints import Saved, load, save
from internvl_checkpoints import in_float64


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """variant -> its checkpoint, which is written once."""
    return cache(lambda variant: save(tmp_path_factory.mktemp(variant), variant))


@pytest.fixture(scope="session")
def ours(saved: Callable[[str], Saved]) -> Callable[..., Any]:
    """variant, dtype -> our model of its checkpoint, which is loaded once: tests don't change it."""
    return cache(lambda variant, dtype=torch.float32: load(saved(variant).folder, dtype))


@pytest.fixture(scope="session")
def theirs(saved: Callable[[str], Saved]) -> Callable[..., Any]:
    """variant, dtype -> transformers' model of its checkpoint, in float32 or float64."""
    model = lambda variant: saved(variant).theirs
    return cache(
        lambda variant, dtype=torch.float32: model(variant) if dtype == torch.float32 else in_float64(model(variant))
    )


@pytest.fixture
def copy(saved: Callable[[str], Saved], tmp_path: Path) -> Callable[[str], Path]:
    """variant -> a copy of its checkpoint's folder, to be changed: a new one in each call."""
    folders = (tmp_path / f"copy{number}" for number in range(100))
    return lambda variant: copytree(saved(variant).folder, next(folders))
