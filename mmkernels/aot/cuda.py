"""Compiles the CUDA C++ kernels for each GPU that the build names, with no GPU there, and reads what they take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmkernels.aot.resources import Resources, code_sizes

TARGETS = ("sm_80", "sm_90a", "sm_100a")  # as in CMakeLists.txt

_CSRC = Path(__file__).resolve().parents[2] / "csrc" / "attention"
_DTYPES = {"Bf16": "bfloat16", "F16": "float16"}
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_PROCESSES = 2


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc not found"
    if shutil.which(_host_compiler()) is None:
        return f"{_host_compiler()} not found"
    return None if _CSRC.is_dir() else "the C++ sources are not there: this is no checkout"


def compile_all() -> list[Resources]:
    """Every CUDA kernel in every variant for every one of `TARGETS`, sorted; raises RuntimeError with nvcc's first
    error."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_PROCESSES) as pool:
        shared = _shared_bytes(Path(folder))
        found = pool.map(lambda target: _compile(target, Path(folder) / f"{target}.cubin", shared), TARGETS)
        return sorted(resources for one in found for resources in one)


def _compile(target: str, cubin: Path, shared: dict[int, int]) -> list[Resources]:
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in include_paths()]
    gencode = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    log = _run("nvcc", *_FLAGS, *includes, gencode, "-Xptxas=-v", "-cubin", "-o", cubin, _CSRC / "cuda.cu")
    code = dict(code_sizes(cubin.read_bytes()))
    return [
        Resources(*_readable(name), target, registers, spilled, static + _dynamic(name, shared), code[f".text.{name}"])
        for name, registers, spilled, static in _parse(log)
    ]


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", "NVCC_PREPEND_FLAGS": ""}
    )
    output = done.stdout + done.stderr
    if done.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        first = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), "\n".join(lines[:3]))
        raise RuntimeError(f"{command[0]} failed: {first}")
    return output


def _parse(log: str) -> Iterator[tuple[str, int, int, int]]:
    """(mangled name, registers, bytes spilled, bytes of static shared memory) of each kernel in ``ptxas -v``."""
    for part in log.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if spilled is None or used is None:
            raise RuntimeError(f"ptxas says what is not understood: {part[:200]}")
        static = re.search(r"(\d+) bytes smem", part)
        spills = int(spilled[1]) + int(spilled[2])
        yield part.partition("'")[0], int(used[1]), spills, int(static[1]) if static else 0


def _readable(mangled: str) -> tuple[str, str]:
    """Kernel and variant: ``_ZN9mmkernels13decode_kernelINS_4Bf16ELi128ELi1EEEv...`` is decode_kernel of bfloat16, D
    128, one tile of 16 rows."""
    found = re.fullmatch(r"_ZN9mmkernels(\d+)(.+)", mangled)
    if found is None:
        raise RuntimeError(f"{mangled} is no kernel of this project")
    length = int(found[1])
    kernel, arguments = found[2][:length], found[2][length:]
    variant = [_DTYPES[name] for name in re.findall(r"INS_\d+(Bf16|F16)E", arguments)]
    variant += [form.format(n) for form, n in zip(("D{}", "{} row tiles"), re.findall(r"Li(\d+)E", arguments))]
    return kernel, " ".join(variant).replace(" 1 row tiles", " 1 row tile")


def _dynamic(mangled: str, shared: dict[int, int]) -> int:
    dims = re.findall(r"Li(\d+)E", mangled)
    return shared[int(dims[0])] if dims else 0


def _host_compiler() -> str:
    return os.environ.get("CXX", "c++")


def _shared_bytes(folder: Path) -> dict[int, int]:
    """The shared memory that a launch asks for, by head dim: what decode_plan.h says."""
    source, program = folder / "shared.cpp", folder / "shared"
    source.write_text(
        f"""#include "{_CSRC / "decode_plan.h"}"
#include <cstdio>
int main() {{
  for (int dim = 1; dim <= 256; ++dim) {{
    if (mmkernels::decode_takes_dim(dim)) {{
      std::printf("%d %d\\n", dim, mmkernels::decode_shared_bytes(dim));
    }}
  }}
}}
"""
    )
    _run(_host_compiler(), "-std=c++17", "-o", program, source)
    lines = (line.split() for line in _run(program).splitlines())
    return {int(dim): int(size) for dim, size in lines}
