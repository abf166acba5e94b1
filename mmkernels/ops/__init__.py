"""One folder an op. Importing this package registers every op; a new folder needs no entry anywhere."""

from __future__ import annotations

import importlib
import pkgutil

from mmkernels.spec import OpSpec

NAMES = tuple(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg and not m.name.startswith("_"))
"""Every op's name, which is its folder's and its public function's."""

for _name in NAMES:
    importlib.import_module(f"{__name__}.{_name}")


def specs() -> dict[str, OpSpec]:
    """Every op's definition, by name."""
    return {name: importlib.import_module(f"{__name__}.{name}.spec").SPEC for name in NAMES}
