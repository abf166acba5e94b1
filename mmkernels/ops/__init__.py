"""One folder an op, in the folder of its family. Importing this package registers every op.

A new folder needs no entry anywhere: an op is a package with a module ``spec``, whose `OpSpec` bears its name.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from mmkernels.spec import OpSpec

_ROOT = Path(__file__).parent
MODULES = {
    path.parent.name: f"{__name__}.{path.parent.parent.name}.{path.parent.name}"
    for path in sorted(_ROOT.glob("*/*/spec.py"), key=lambda path: path.parent.name)
}
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
    return _ROOT.joinpath(*MODULES[name].split(".")[2:])
