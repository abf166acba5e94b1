"""Compiles the CUDA C++ kernels for each GPU that the build names, with no GPU there, and reads what they take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from pathlib import Path
from typing import NamedTuple

from mmkernels.aot import cache
from mmkernels.aot.resources import Row, Usage, code_sizes
from mmkernels.plan import CudaSource
from mmkernels.runtime import tuning

TARGETS = ("sm_80", "sm_90a", "sm_100a")  # as in CMakeLists.txt

_CSRC = cache.ROOT / "csrc"
_DTYPES = {"Bf16": "bfloat16", "F16": "float16"}
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_PROCESSES = 2


def why_not() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc not found"
    if shutil.which(_host_compiler()) is None:
        return f"{_host_compiler()} not found"
    return None if _CSRC.is_dir() else "the C++ sources are not there: this is no checkout"


def compile_all(targets: Sequence[str] = TARGETS) -> tuple[list[Row], int]:
    """Returns a row for every CUDA kernel, variant and target, sorted, and how many had to be compiled: the results are
    kept until one of the sources, nvcc or torch changes.

    Raises:
        RuntimeError: nvcc's first error.
    """
    sources = [(op, plan.cuda) for op, plan in tuning.plans().items() if plan.cuda is not None]
    jobs = [(op, source, target) for op, source in sources for target in targets]
    with ThreadPoolExecutor(_PROCESSES) as pool:
        parts = list(pool.map(lambda job: _compile_once(*job), jobs))
    rows = sorted(row for part, _ in parts for row in part)
    return rows, sum(len(part) for part, compiled in parts if compiled)


def _compile_once(op: str, source: CudaSource, target: str) -> tuple[list[Row], bool]:
    import torch

    texts = [path.read_text() for path in _included(_CSRC / source.path, _CSRC / source.shared_bytes[0])]
    key = cache.key_of(texts, source, target, _FLAGS, nvcc_version(), torch.__version__)
    kept = cache.read(key)
    if kept is not None:
        return [Row(op, kernel, variant, target, Usage(*usage)) for kernel, variant, usage in kept], False
    rows = compile_source(op, source, target)
    cache.write(key, [(row.kernel, row.variant, row.usage) for row in rows])
    return rows, True


def _included(*paths: Path) -> list[Path]:
    """Returns the files and all of ours that they include."""
    found: dict[Path, None] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop().resolve()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            waiting += [folder / name for folder in (path.parent, _CSRC) if (folder / name).is_file()]
    return list(found)


def compile_source(op: str, source: CudaSource, target: str) -> list[Row]:
    """Returns a row for every kernel of a source file."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in (_CSRC, *include_paths())]
    gencode = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{target}.cubin"
        log = _run("nvcc", *_FLAGS, *includes, gencode, "-Xptxas=-v", "-cubin", "-o", cubin, _CSRC / source.path)
        code = dict(code_sizes(cubin.read_bytes()))
        kernels = list(_parse(log))
        shared = _shared_bytes(source, [kernel.first for kernel in kernels], Path(folder))
    rows = []
    for kernel in kernels:
        shared_bytes = kernel.static + shared.get(kernel.first, 0)
        usage = Usage(kernel.registers, kernel.spilled, shared_bytes, code[f".text.{kernel.mangled}"])
        rows.append(Row(op, *readable(kernel.mangled, source), target, usage))
    return rows


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


@once
def nvcc_version() -> str:
    return _run("nvcc", "--version")


class _Kernel(NamedTuple):
    """What ``ptxas -v`` says of a kernel; static: bytes of shared memory."""

    mangled: str
    registers: int
    spilled: int
    static: int

    @property
    def first(self) -> int | None:
        """The first integer template argument."""
        arguments = _integers(self.mangled)
        return arguments[0] if arguments else None


def _parse(log: str) -> Iterator[_Kernel]:
    for part in log.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if spilled is None or used is None:
            raise RuntimeError(f"ptxas says what is not understood: {part[:200]}")
        static = re.search(r"(\d+) bytes smem", part)
        spills = int(spilled[1]) + int(spilled[2])
        yield _Kernel(part.partition("'")[0], int(used[1]), spills, int(static[1]) if static else 0)


def _integers(mangled: str) -> list[int]:
    return [int(n) for n in re.findall(r"Li(\d+)E", mangled)]


def readable(mangled: str, source: CudaSource) -> tuple[str, str]:
    """Returns kernel and variant: ``_ZN9mmkernels13decode_kernelINS_4Bf16ELi128ELi1EEEv...`` is decode_kernel of
    bfloat16, D 128, one tile of 16 rows."""
    match = re.fullmatch(r"_ZN9mmkernels(\d+)(.+)", mangled)
    if match is None:
        raise RuntimeError(f"{mangled} is no kernel of this project")
    length = int(match[1])
    kernel, arguments = match[2][:length], match[2][length:]
    variant = [_DTYPES[name] for name in re.findall(r"INS_\d+(Bf16|F16)E", arguments)]
    variant += [form.format(n) for form, n in zip(source.arguments, _integers(arguments))]
    return kernel, " ".join(variant).replace(" 1 row tiles", " 1 row tile")


def _host_compiler() -> str:
    return os.environ.get("CXX", "c++")


def _shared_bytes(source: CudaSource, arguments: Sequence[int | None], folder: Path) -> dict[int | None, int]:
    """Returns the dynamic shared memory of a launch by the kernel's first template argument, as the header says."""
    known = sorted({n for n in arguments if n is not None})
    if not known:
        return {}
    header, function = source.shared_bytes
    text, program = folder / "shared.cpp", folder / "shared"
    lines = "\n".join(f'  std::printf("%d %d\\n", {n}, static_cast<int>({function}({n})));' for n in known)
    text.write_text(f'#include "{_CSRC / header}"\n#include <cstdio>\nint main() {{\n{lines}\n}}\n')
    _run(_host_compiler(), "-std=c++17", "-o", program, text)
    output = (line.split() for line in _run(program).splitlines())
    return {int(n): int(size) for n, size in output}
