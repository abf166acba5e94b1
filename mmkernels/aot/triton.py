"""Compiles Triton kernels for a target, with no GPU there: what their launchers would launch, recorded."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from mmkernels.aot.resources import Resources, code_sizes
from mmkernels.runtime.triton import Launch, launch_options

TARGETS = {
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


Specialisation = tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]


def specialisation(launch: Launch) -> Specialisation:
    """Types by argument, constants and attributes by place, as Triton's launcher derives them: alignment, ones, None.

    Launches that agree in these and in their configuration run the same code.
    """
    names = launch.kernel.arg_names
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        signature[name] = _type_of(value, (place,), constants, attributes)
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    return signature, constants, attributes


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel."""
    source = ASTSource(launch.kernel, *specialisation(launch))
    return triton.compile(source, target=TARGETS[target], options=launch_options(launch.config))


def check_frontend(launch: Launch, target: str) -> None:
    """Translate a launch as far as Triton's own language goes: what differs between its versions shows here."""
    backend = make_backend(TARGETS[target])
    options = backend.parse_options(launch_options(launch.config))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(launch.kernel, *specialisation(launch))
    arguments = (options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    takes_target = "target" in inspect.signature(source.make_ir).parameters
    source.make_ir(*((TARGETS[target], *arguments) if takes_target else arguments))


def _type_of(value: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: Any) -> Any:
    if isinstance(value, tuple):
        kinds = [_type_of(x, (*path, n), constants, attributes) for n, x in enumerate(value)]
        return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)  # kernels read fields by name
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
    return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"


def resources(launch: Launch, variant: str, target: str) -> Resources:
    """Compile and read what the kernel takes."""
    compiled = compile_launch(launch, target)
    if target.startswith("sm"):
        binary = compiled.asm["cubin"]
        registers, spilled = _usage(binary)
    else:
        binary, text = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return Resources(
        launch.kernel.__name__,
        variant,
        target,
        registers,
        spilled,
        compiled.metadata.shared,
        sum(size for _, size in code_sizes(binary)),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of stack and local memory, which spilled registers go to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler says nothing that matches {pattern!r}")
    return int(found[1])
