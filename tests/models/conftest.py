import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from idefics_checkpoints import VARIANTS, Saved, save


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The checkpoint of a variant, made once."""
    made: dict[str, Saved] = {}

    def get(variant: str) -> Saved:
        if variant not in made:
            made[variant] = save(tmp_path_factory.mktemp(variant), **VARIANTS[variant])
        return made[variant]

    return get
