"""open_clip's own losses, which tests run beside ours. `make test` installs the release, without what it depends on."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    """Returns why there is no open_clip to compare with, or None."""
    return None if _file() else "needs open_clip_torch in build/, where `make test` installs it"


@cache
def open_clip() -> ModuleType:
    """Returns the module `open_clip.loss`, loaded alone, as the package around it needs much that is not installed."""
    file = _file()
    assert file is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss_alone", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _file() -> Path | None:
    return next(iter(sorted(_ROOT.glob("build/open_clip_torch==*/open_clip/loss.py"))), None)
