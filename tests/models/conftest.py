import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from idefics_checkpoints import VARIANTS, Saved, save


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The checkpoint of a variant, made once."""
    made: dict[str, Saved] = {}

    def get(variant: str) -> Saved:
        if variant not in made:
            made[variant] = save(tmp_path_factory.mktemp(variant), **VARIANTS[variant])
        return made[variant]

    return get
