"""Compiles Triton kernels for a target with no GPU, and reads what they take."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from mmkernels.aot import cache
from mmkernels.aot.resources import Usage, code_sizes
from mmkernels.runtime.triton import Launch, launch_options

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_ALIGNED = [["tt.divisibility", 16]]
_Path = tuple[int, ...]  # of an argument: its place, and places in nested tuples


@dataclass(frozen=True)
class Job:
    """What must be compiled for a launch, without the launch's tensors, so that another process can do it.

    Args:
        key: of everything that the machine code depends on: the sources of the kernel, of the functions and constants
            that it reaches, types, constants, target, Triton's version. Jobs with one key run the same code.
        module, kernel: where the ``@triton.jit`` function is.
        signature, constants, attributes: as `ASTSource` takes them.
        options: of the compiler.
    """

    key: str
    target: str = field(compare=False)
    module: str = field(compare=False)
    kernel: str = field(compare=False)
    signature: dict[str, Any] = field(compare=False)
    constants: dict[_Path, Any] = field(compare=False)
    attributes: dict[_Path, Any] = field(compare=False)
    options: dict[str, Any] = field(compare=False)

    @property
    def source(self) -> ASTSource:
        function = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(function, self.signature, self.constants, self.attributes)


def describe(launch: Launch, target: str) -> Job:
    """Returns the job of a launch, specialised as Triton's own launcher does it: by alignment, ones and None."""
    names = launch.kernel.arg_names
    signature: dict[str, Any] = {}
    constants: dict[_Path, Any] = {}
    attributes: dict[_Path, Any] = {}
    for place, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        signature[name] = _type_of(value, (place,), constants, attributes)
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    options = launch_options(launch.config)
    function = launch.kernel.fn
    key = cache.key_of(
        triton.__version__, target, launch.kernel.cache_key, signature, constants, attributes, sorted(options.items())
    )
    return Job(key, target, function.__module__, function.__name__, signature, constants, attributes, options)


def _type_of(value: Any, path: _Path, constants: dict[_Path, Any], attributes: dict[_Path, Any]) -> Any:
    if isinstance(value, tuple):
        types = [_type_of(x, (*path, n), constants, attributes) for n, x in enumerate(value)]
        return value._make(types) if hasattr(value, "_make") else tuple(types)
    if value is None or (type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attributes[path] = _ALIGNED
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, int):
        if value % 16 == 0:
            attributes[path] = _ALIGNED
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if len(path) > 1:  # compiles, and can't be launched
        raise TypeError("a descriptor must be an argument of its own: Triton's launcher passes none in a tuple")
    return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"


def measure(job: Job) -> Usage:
    """Compile, and return what the kernel takes."""
    compiled = triton.compile(job.source, target=GPUS[job.target], options=job.options)
    if job.target.startswith("sm"):
        binary = compiled.asm["cubin"]
        registers, spilled = _usage(binary)
    else:
        binary, text = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return Usage(registers, spilled, compiled.metadata.shared, sum(size for _, size in code_sizes(binary)))


def translate(job: Job) -> None:
    """Translate a kernel as far as Triton's own language goes, where the versions of Triton differ."""
    backend = make_backend(GPUS[job.target])
    options = backend.parse_options(job.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = job.source
    arguments = (options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    takes_target = "target" in inspect.signature(source.make_ir).parameters
    source.make_ir(*((GPUS[job.target], *arguments) if takes_target else arguments))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Returns a thread's registers, and its bytes of stack and local memory, which registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler says nothing that matches {pattern!r}")
    return int(match[1])
