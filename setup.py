"""Builds the extensions, each a target of CMakeLists.txt; everything else about the package is in pyproject.toml.

An extension that can't be built (no compiler, no CMake, a compile error) is left out, and the Python parts install: the
reason goes to stderr and, for run time, to `mmkernels/<extension>_why_not.txt`. With MMKERNELS_REQUIRE_EXT=1, the one
environment variable that building reads beside the compiler's own, it is an error; except for the CUDA extension on a
machine that is not made for it, with no nvcc or with a torch without CUDA.
"""

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's packages put it, often not on PATH


class BuildFailed(Exception):
    """Says in one line why an extension could not be built."""


class NotForThisMachine(BuildFailed):
    """The extension would be of no use here: that it is left out is right, not an error."""


def find_tool(name: str) -> str:
    """The path of a program, looked for beside this Python first: its environment need not be activated."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise BuildFailed(f"{name} not found")
    return path


def run(*command: str) -> None:
    """Runs a command, shows what it prints, and raises with the first error among that if it fails."""
    lines = []
    english = {**os.environ, "LC_ALL": "C"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=english) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                lines.append(line.strip())
    if process.returncode:
        first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), 0)
        reason = re.sub(r"^CMake Error at \S+ \(\w+\): ", "", " ".join(lines[first : first + 3]))
        raise BuildFailed(reason.rstrip(".") or f"{command[0]} failed")


def find_nvcc() -> str:
    """The path of nvcc on a machine that has use for it."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise NotForThisMachine("torch is not there while building (build isolation?)")
    # Read, not imported: that takes seconds, and needs what a CUDA build of torch needs.
    if runpy.run_path(str(Path(torch.origin).with_name("version.py"))).get("cuda") is None:
        raise NotForThisMachine("the torch that is there while building is built without CUDA")
    try:
        return find_tool("nvcc")
    except BuildFailed as error:
        if not USUAL_NVCC.is_file():
            raise NotForThisMachine(str(error)) from None
        return str(USUAL_NVCC)


def build_folder(nvcc: str | None) -> Path:
    """One folder for each Python, checkout and compiler: CMake's cache can't change any of them afterwards."""
    key = (sysconfig.get_config_var("EXT_SUFFIX"), ROOT, os.environ.get("CXX"), os.environ.get("CXXFLAGS"))
    key = key if nvcc is None else (*key, nvcc)
    return ROOT / "build" / f"cmake-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"


class CMakeBuild(build_ext):
    def run(self) -> None:
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.rpartition(".")[2]
        library = Path(self.get_ext_fullpath(ext.name))
        why_not = library.with_name(f"{target}_why_not.txt")
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        why_not.unlink(missing_ok=True)
        try:
            if target == "_cpu" and importlib.util.find_spec("torch") is None:
                raise BuildFailed("torch is not there while building (build isolation?)")
            shutil.copy(self.build_target(target) / library.name, library)
        except BuildFailed as error:
            if os.environ.get("MMKERNELS_REQUIRE_EXT") == "1" and not isinstance(error, NotForThisMachine):
                raise SystemExit(f"error: {ext.name} is not built: {error}") from None
            why_not.write_text(f"{error}\n")
            print(f"warning: {ext.name} is not built: {error}; installing without it", file=sys.stderr)

    def build_target(self, target: str) -> Path:
        nvcc = find_nvcc() if target == "_cuda" else None
        folder = build_folder(nvcc)
        cmake = find_tool("cmake")
        options = {"CMAKE_MAKE_PROGRAM": find_tool("ninja"), "Python_EXECUTABLE": sys.executable}
        options |= {} if nvcc is None else {"MMKERNELS_NVCC": nvcc}
        run(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items()))
        run(cmake, "--build", str(folder), "--target", target)
        return folder


# CMakeLists.txt names each target's sources; `depends` puts them all into the source distribution.
SOURCES = ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*")) if p.is_file())]

setup(
    ext_modules=[Extension(f"mmkernels.{name}", sources=[], depends=SOURCES) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
