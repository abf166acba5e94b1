"""The op that CONTRIBUTING.md shows is added to a copy of the package, word for word, and works as it promises."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import mmkernels

ROOT = Path(__file__).parents[1]

CHECK = """
import sys
sys.path.append({tests!r})
import torch
from mmkernels import ops
from mmkernels.runtime.dispatch import TABLES
from mmkernels.ops.demo.double import double
from harness import check

spec = ops.specs()["double"]
assert "double" in ops.NAMES and [x.name for x in TABLES["double"]] == ["reference"]
assert spec.function is double
assert check(spec, spec.cases[0], torch.float32, "reference") == 2
x = torch.randn(3, requires_grad=True)
compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
(first,), (second,) = (torch.autograd.grad(f(x).square().sum(), x, create_graph=True) for f in (double, compiled))
torch.testing.assert_close(first, 8 * x)
torch.testing.assert_close(second, 8 * x)
torch.library.opcheck(torch.ops.mmkernels.double.default, (x, ""))
print("it works")
"""


def test_the_op_of_contributing_works(tmp_path: Path) -> None:
    package = tmp_path / "mmkernels"
    shutil.copytree(Path(mmkernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(
        r"```python\n# (mmkernels/\S+):[^\n]*\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 2
    (package / "ops" / "demo").mkdir()
    (package / "ops" / "demo" / "__init__.py").touch()
    for name, code in blocks:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    code = CHECK.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("it works"), done.stderr

    with (package / "__init__.py").open("a") as exports:
        exports.write("\nfrom mmkernels.ops.demo.double import double as double\n")
    # From the copy's folder, which Python then finds the package in.
    options = ["-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-k", "double", "-p", "no:cacheprovider"]
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", *options, *files]
    tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert tested.returncode == 0 and " passed" in tested.stdout, tested.stdout


def test_the_glossary_is_short() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Words\n")[2].partition("\n## ")[0]
    assert 2 < words.count("\n|") - 2 <= 40
