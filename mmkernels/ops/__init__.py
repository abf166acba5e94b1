"""One folder an op, in the folder of its family. Importing this package registers every op.

A new folder needs no entry anywhere: an op is a package with a module ``spec``, whose `OpSpec` bears its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from mmkernels.spec import OpSpec


def _find() -> dict[str, str]:
    found = {}
    for family in pkgutil.iter_modules(__path__):
        for op in pkgutil.iter_modules([str(Path(__path__[0]) / family.name)]) if family.ispkg else ():
            if Path(__path__[0], family.name, op.name, "spec.py").is_file():
                found[op.name] = f"{__name__}.{family.name}.{op.name}"
    return dict(sorted(found.items()))


MODULES = _find()
"""The module of each op by the op's name, which is its folder's and its public function's."""
NAMES = tuple(MODULES)
"""Every op's name."""

for _module in MODULES.values():
    importlib.import_module(_module)


def specs() -> dict[str, OpSpec]:
    """Returns every op's definition, by name."""
    return {name: importlib.import_module(f"{module}.spec").SPEC for name, module in MODULES.items()}


def folder(name: str) -> Path:
    """Returns the folder of an op's sources."""
    return Path(__path__[0]).joinpath(*MODULES[name].split(".")[2:])
