"""What installing does without a compiler and with broken C++; each build is of a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels.runtime import cpu, host

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["CMakeLists.txt", "LICENSE", "README.md", "csrc", "mmkernels", "pyproject.toml", "setup.py"]

needs_compiler = pytest.mark.skipif(host.why_not is not None, reason=str(host.why_not))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources with nothing built."""
    built = shutil.ignore_patterns("*.so", "*_why_not.txt", "__pycache__")
    for name in SOURCES:
        source, copy = ROOT / name, tmp_path / "checkout" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy, ignore=built) if source.is_dir() else shutil.copy(source, copy)
    return tmp_path / "checkout"


def run_python(*args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "MMKERNELS_REQUIRE_EXT"}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=inherited | env, capture_output=True, text=True)


def build_in_place(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run_python("setup.py", "build_ext", "--inplace", cwd=checkout, **env)


def test_without_compiler_python_parts_install_and_say_so(checkout: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    options = ["-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", target]
    installed = run_python("-m", "pip", "install", *options, ".", cwd=checkout, CXX="/nonexistent/c++")
    assert installed.returncode == 0, installed.stderr
    assert "mmkernels._cpu is not built" in installed.stdout + installed.stderr

    ran = run_python(
        "-c",
        "from mmkernels.runtime import host; print(host.__file__, host.why_not, host.isa(), sep='\\n')",
        cwd=tmp_path,
        PYTHONPATH=str(target),
    )
    assert ran.returncode == 0, ran.stderr
    file, why_not, isa = ran.stdout.splitlines()
    assert Path(file) == target / "mmkernels" / "runtime" / "host.py"
    assert why_not.startswith("the CPU extension is not built: ")
    assert "/nonexistent/c++" in why_not
    assert isa == host.isa()


@needs_compiler
@pytest.mark.slow  # compiles
def test_broken_source_fails_where_the_extension_is_required(checkout: Path) -> None:
    for family in ("attention", "contrastive"):  # CMake takes sources by pattern: what is left builds in seconds
        shutil.rmtree(checkout / "csrc" / family)
    source = checkout / "csrc" / "bindings.cpp"
    good = source.read_text()
    source.write_text("this is not C++;\n")  # alone: no header has to be read for it
    why_not = checkout / "mmkernels" / "_cpu_why_not.txt"

    required = build_in_place(checkout, MMKERNELS_REQUIRE_EXT="1")
    assert required.returncode != 0
    assert "mmkernels._cpu is not built" in required.stderr
    assert not why_not.exists()

    optional = build_in_place(checkout)
    assert optional.returncode == 0, optional.stderr
    assert "mmkernels._cpu is not built" in optional.stderr
    assert "bindings.cpp" in why_not.read_text()

    source.write_text(good)
    repaired = build_in_place(checkout, MMKERNELS_REQUIRE_EXT="1")
    assert repaired.returncode == 0, repaired.stderr
    assert not why_not.exists()
    assert list((checkout / "mmkernels").glob("_cpu.*.so"))
    if torch.version.cuda is None:  # required, but of no use here
        assert "mmkernels._cuda is not built" in repaired.stderr
        assert "without CUDA" in (checkout / "mmkernels" / "_cuda_why_not.txt").read_text()


@pytest.mark.parametrize(
    ("version", "nvcc", "found"),
    [
        ("cuda = None", True, "without CUDA"),
        ("cuda = '13.0'", False, "nvcc not found"),
        ("cuda = '13.0'", True, "/nvcc"),
        (None, True, "torch is not there"),
    ],
)
def test_cuda_extension_only_where_it_is_of_use(version: str | None, nvcc: bool, found: str, tmp_path: Path) -> None:
    """Without importing torch: this one is nothing but a version, or is hidden."""
    setup = str(ROOT / "setup.py")
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
        (tmp_path / "torch" / "version.py").write_text(f"{version}\n")
    if nvcc:
        (tmp_path / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / "nvcc").chmod(0o755)
    code = f"""
import importlib.util, pathlib, setuptools
setuptools.setup = lambda **_: None
if {version is None}:
    importlib.util.find_spec = lambda name: None
names = {{"__file__": {setup!r}, "__name__": "setup"}}
exec(pathlib.Path({setup!r}).read_text(), names)
names["USUAL_NVCC"] = pathlib.Path("/nonexistent/nvcc")
try:
    print(names["find_nvcc"]())
except names["NotForThisMachine"] as error:
    print(error)
"""
    ran = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), PATH=str(tmp_path))
    assert found in ran.stdout, ran.stderr


@pytest.mark.slow
@needs_compiler
def test_a_wheel_is_all_that_a_user_needs(checkout: Path, tmp_path: Path) -> None:
    """With every kernel, for every instruction set; built, installed and run outside of the checkout."""
    target = tmp_path / "site"
    tuned = (
        Path("mmkernels") / "ops" / "attention" / "cross_attention" / "tuned.json"
    )  # as a GPU's measurement leaves it
    (checkout / tuned).write_text("[]")
    options = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "--target", target]
    installed = run_python("-m", "pip", "install", *options, ".", cwd=checkout, MMKERNELS_REQUIRE_EXT="1")
    assert installed.returncode == 0, installed.stderr
    assert (target / "mmkernels" / "py.typed").is_file() and (target / tuned).read_text() == "[]"
    code = """
import mmkernels, torch
from mmkernels.runtime import cpu
print(mmkernels.__file__, *cpu.isas())
q, x = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
mmkernels.cross_attention(q, q, q, backend="cpu").sum().backward()
mmkernels.info_nce(x, x, 5.0, backend="cpu").backward()
"""
    ran = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert ran.returncode == 0, ran.stderr
    file, *isas = ran.stdout.split()
    assert Path(file).parent == target / "mmkernels" and isas == cpu.isas()
