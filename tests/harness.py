"""How an op is checked: its spec's cases on a backend, against float64, within its error budget."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.runtime import triton as gpu
from mmkernels.runtime.dispatch import TABLES
from mmkernels.spec import Case, Inputs, OpSpec, cast, flatten

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Result:
    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor]


def backends(spec: OpSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    """The op's backends that this machine can run, and that compute any case in `dtype` on `device`."""
    probe = torch.empty(0, dtype=dtype, device=device)
    able = (entry for entry in TABLES[spec.name] if entry.why_not() is None and entry.name != "cuda")
    found = [entry.name for entry in able if entry.name in ("chunked", "reference") or entry.why_not((probe,)) is None]
    # Under Triton's interpreter its kernels alone: the others are tested without.
    return [name for name in found if name == "triton"] if gpu.INTERPRETED else found


def needed(found: list[str]) -> list[str]:
    """`found`, or the test is skipped, and counted: a loop over nothing would pass."""
    if not found:
        pytest.skip("no backend that is tested here computes this")
    return found


def draw(case: Case) -> Inputs:
    """The case's inputs in float64, the same each time."""
    return case.make(torch.Generator().manual_seed(zlib.crc32(case.id.encode())))


def cotangent(x: Tensor) -> Tensor:
    """A fixed direction for a gradient."""
    generator = torch.Generator().manual_seed(x.numel())
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)


def run(spec: OpSpec, case: Case, inputs: Inputs, backend: str, **more: Any) -> Result:
    """Outputs, and the gradients of `case.grads` for fixed cotangents."""
    inputs = {name: x.detach().requires_grad_() if name in case.grads else x for name, x in inputs.items()}
    if case.seeded:
        torch.manual_seed(7)
    outputs = flatten(spec.function(**inputs, backend=backend, **more))
    leaves = [inputs[name] for name in case.grads]
    return Result(tuple(x.detach() for x in outputs), dict(zip(case.grads, gradients(outputs, leaves), strict=True)))


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """By `leaves`, of those outputs that have a gradient, for fixed cotangents."""
    if not leaves:
        return ()
    outputs = tuple(x for x in outputs if x.requires_grad)
    # -inf is the log-sum-exp of nothing: no direction moves it.
    weights = [cotangent(x).masked_fill(x.detach() == -torch.inf, 0.0) for x in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


def check(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> int:
    """Assert the op's error budget for one case; returns how many tensors were compared.

    Truth is the reference in float64 on the inputs as `dtype` rounds them; see `OpSpec.over_budget`.
    """
    inputs = cast(draw(case), dtype, device, spec.always_wide)
    truth = run(spec, case, cast(inputs, torch.float64), "reference")
    baseline = run(spec, case, inputs, "reference")
    poison()
    ours = run(spec, case, inputs, backend)
    names = [f"output {n}" for n in range(len(ours.outputs))] + [f"gradient of {name}" for name in case.grads]
    triples = zip(
        (*ours.outputs, *ours.grads.values()),
        (*baseline.outputs, *baseline.grads.values()),
        (*truth.outputs, *truth.grads.values()),
        strict=True,
    )
    for name, (mine, naive, true) in zip(names, triples, strict=True):
        problem = spec.over_budget(mine.cpu(), naive.cpu(), true.cpu())
        assert problem is None, f"{spec.name} / {case.id} / {backend} / {dtype} / {name}: {problem}"
    return len(names)


def poison() -> None:
    """Leave NaN in the allocator's free lists, so that an output that is not written shows."""
    for size in (64, 256, 1024, 4096, 16384, 65536):
        blocks = [torch.full((size,), torch.nan) for _ in range(4)]
        del blocks
