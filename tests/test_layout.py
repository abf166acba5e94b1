"""The direction of imports, read from the source: nothing points up, and no family of ops to a sister family."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmkernels

PACKAGE = Path(mmkernels.__file__).parent

LAYERS = (
    ("plan",),
    ("runtime",),
    ("masks", "options", "interrupts", "transformers_version"),
    ("targets",),
    ("spec",),
    ("ops",),
    ("pruning",),
    ("nn",),
    ("objectives", "evaluation"),
    ("models",),
    ("report",),
    ("meters",),
    ("machine",),
    ("testing",),
    ("integrations",),
    ("profiling", "bench", "aot", "planning"),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
"""Modules and packages of `mmkernels`; each imports from its own entry and from those before it."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = {name: path for name, path in modules() if name}


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it, without the package's own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] == "mmkernels":
                module = node.module.removeprefix("mmkernels").lstrip(".")
                yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (x.name.removeprefix("mmkernels.") for x in node.names if x.name.startswith("mmkernels."))


def layer(module: str) -> int:
    top = module.split(".")[0]
    found = [n for n, names in enumerate(LAYERS) if top in names]
    assert found, f"mmkernels/{top} has no layer in {__name__}"
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_points_up_or_to_a_sister(module: str) -> None:
    here = module.split(".")
    for target in imports(MODULES[module]):
        there = target.split(".")
        if there[0] not in {name for names in LAYERS for name in names}:
            continue  # a public function or class: `from mmkernels import SpanMask`
        if there[0] == here[0]:
            if there[0] == "ops" and len(there) > 1 and len(here) > 1 and there[1] != here[1]:
                assert there[1] == "common", f"mmkernels.{module} imports from another family: mmkernels.{target}"
            continue
        assert layer(target) < layer(module), f"mmkernels.{module} imports mmkernels.{target}, of a later layer"


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_module(module: str) -> None:
    for target in imports(MODULES[module]):
        private = [part for part in target.split(".") if part.startswith("_") and not part.startswith("__")]
        assert not private or private == ["_cpu"], f"mmkernels.{module} imports the private mmkernels.{target}"
