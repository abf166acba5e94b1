"""How a call of any op travels: backends, graphs, transforms, compiled code, threads, and where its tensors lie.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from harness import (
    SPECS,
    Result,
    backends,
    call,
    draw,
    dtype_of,
    inputs_in,
    largest,
    leaves_of,
    name_of,
    no_old_graphs,
    run,
    stand_in,
)
from layouts import embedded, far_apart
from ops.cpu_tools import DTYPES, ISAS, needs_kernels, python
from pairwise import kinds, parametrize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkernels import BackendError, SpanMask, use_backend
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu
from mmkernels.spec import Case, Inputs, OpSpec


def _richest(cases: list[Case]) -> Case:
    """The case with the most gradients, and among these with the most arguments."""
    return max(cases, key=lambda case: (len(case.grads), len(draw(case))))


RICHEST = {spec.name: _richest(list(spec.cases)) for spec in SPECS.values()}
UNSEEDED = {spec.name: _richest([case for case in spec.cases if not case.seeded]) for spec in SPECS.values()}
DIFFERENTIABLE = [spec for spec in SPECS.values() if RICHEST[spec.name].grads]

EXACTLY: dict[str, Any] = {"rtol": 0, "atol": 0}

each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
each_differentiable_backend = pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(spec, name, id=f"{spec.name}-{name}") for spec in DIFFERENTIABLE for name in backends(spec)],
)


def _inputs(spec: OpSpec, case: Case, backend: str) -> Inputs:
    """In the widest dtype that the backend computes in."""
    return inputs_in(spec, case, dtype_of(spec.name, backend))


def _same(found: Result, want: Result, exactly: bool = False) -> None:
    """The same bits, or the same but for rounding."""
    assert found.grads.keys() <= want.grads.keys()
    bounds = EXACTLY if exactly else {}
    torch.testing.assert_close(found.outputs, want.outputs, equal_nan=True, **bounds)
    torch.testing.assert_close(found.grads, {name: want.grads[name] for name in found.grads}, **bounds)


# The choice of a backend.


@each_op
def test_a_block_or_an_argument_chooses_the_backend(spec: OpSpec) -> None:
    case = RICHEST[spec.name]
    inputs = draw(case)
    found = lambda backend=None: call(spec, case, inputs, backend)
    first = stand_in(spec)  # of those that compute float64
    naive, fastest = found("reference"), found(first)
    torch.testing.assert_close(found(), fastest, **EXACTLY)
    with use_backend("reference"):
        torch.testing.assert_close(found(), naive, **EXACTLY)
        torch.testing.assert_close(found(first), fastest, **EXACTLY)
        with use_backend(first):
            torch.testing.assert_close(found(), fastest, **EXACTLY)
    for absent in ("triton", "cuda"):
        with pytest.raises(BackendError, match=f"^{spec.name} (can't run this call|has no backend)"):
            found(absent)
    for unknown in ("fast", "CPU"):
        for attempt in (found, use_backend):
            with pytest.raises(ValueError, match=f"^backend must be one of .*, or None; got '{unknown}'"):
                attempt(unknown)


# Graphs.


def _wanted() -> list[tuple[OpSpec, str, tuple[str, ...]]]:
    """Op, backend, and some of the arguments to differentiate by."""
    rows = []
    for spec in DIFFERENTIABLE:
        names = RICHEST[spec.name].grads
        for some in itertools.product((False, True), repeat=len(names)):
            if any(some):
                rows += [(spec, backend, tuple(itertools.compress(names, some))) for backend in backends(spec)]
    return rows


@pytest.mark.interpreted
@parametrize(
    "spec, backend, wanted",
    _wanted(),
    lambda row: (
        {"backend": (row[0].name, row[1])} | {f"{row[0].name} {x}": x in row[2] for x in RICHEST[row[0].name].grads}
    ),
    ids=lambda row: f"{row[0].name}-{row[1]}-{'+'.join(row[2])}",
)
def test_only_the_gradients_that_are_wanted(spec: OpSpec, backend: str, wanted: tuple[str, ...]) -> None:
    case = replace(RICHEST[spec.name], grads=wanted)
    _same(run(spec, case, _inputs(spec, case, backend), backend), _with_all_gradients(spec.name, backend))


@cache
def _with_all_gradients(op: str, backend: str) -> Result:
    return run(SPECS[op], RICHEST[op], _inputs(SPECS[op], RICHEST[op], backend), backend)


@each_differentiable_backend
def test_a_graph_is_made_where_one_is_wanted_and_may_be_walked_twice(spec: OpSpec, backend: str) -> None:
    case = RICHEST[spec.name]
    inputs = leaves_of(case, _inputs(spec, case, backend))
    outputs = tuple(x for x in call(spec, case, inputs, backend) if x.requires_grad)
    leaves = [inputs[name] for name in case.grads]
    first, again = (
        torch.autograd.grad([x.sum() for x in outputs], leaves, retain_graph=more) for more in (True, False)
    )
    torch.testing.assert_close(first, again, **EXACTLY)
    assert all(bool(x.any()) for x in first)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = call(spec, case, inputs, backend)
        assert not any(x.requires_grad for x in found)
        _same(Result(found, {}), _with_all_gradients(spec.name, backend))


@each_differentiable_backend
def test_checkpointing_gives_the_same(spec: OpSpec, backend: str) -> None:
    """Dropout too, whose seed is drawn again."""
    case = RICHEST[spec.name]
    inputs = _inputs(spec, case, backend)
    again = lambda **more: checkpoint(spec.function, use_reentrant=False, **more)
    _same(run(spec, case, inputs, backend, again), _with_all_gradients(spec.name, backend), exactly=True)


@each_differentiable_backend
def test_second_derivatives_under_autocast(spec: OpSpec, backend: str) -> None:
    """What was computed outside of it is differentiated as exactly inside."""
    if backend == "reference":
        pytest.skip("in plain PyTorch autocast reaches the second derivative's products")
    case = UNSEEDED[spec.name]
    inputs = leaves_of(case, inputs_in(spec, case))
    leaves = [inputs[name] for name in case.grads[:2]]

    def product() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", enabled=False):
            (first,) = torch.autograd.grad(
                call(spec, case, inputs, backend)[0].square().sum(), leaves[0], create_graph=True
            )
        return torch.autograd.grad(first.square().sum(), leaves)

    want = product()
    with torch.autocast("cpu", torch.bfloat16):
        found = product()
    for x, y in zip(found, want, strict=True):
        assert bool(y.any()) and float((x - y).norm()) <= 1e-5 * float(y.norm())


# Compiled code.


@pytest.mark.parametrize(
    "spec",
    [pytest.param(x, id=x.name, marks=pytest.mark.slow if n else ()) for n, x in enumerate(DIFFERENTIABLE)],
)
def test_compiled_by_inductor_with_gradients(spec: OpSpec) -> None:
    """Between operators that Inductor fuses."""
    case, function = UNSEEDED[spec.name], spec.function
    first = case.grads[0]

    def between(backend: str, **inputs: Any) -> Any:
        return function(**inputs | {first: 2 * inputs[first]}, backend=backend)

    backend = stand_in(spec)
    want = run(spec, case, draw(case), backend, between)
    with no_old_graphs():
        _same(run(spec, case, draw(case), backend, torch.compile(between, fullgraph=True)), want)


@each_op
def test_a_compiled_function_serves_other_sizes(spec: OpSpec) -> None:
    groups: dict[Any, list[Case]] = {}
    for case in spec.cases:
        if not case.seeded and not any(isinstance(x, float) for x in draw(case).values()):
            groups.setdefault(tuple(sorted(kinds(case).items())), []).append(case)
    cases = max(groups.values(), key=len)[:3]
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=True)
    backend = stand_in(spec)
    for case in cases:
        _same(run(spec, case, draw(case), backend, compiled), run(spec, case, draw(case), backend))


# Threads and processes.


@pytest.mark.alone
@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(s, x, id=f"{s.name}-{x}") for s in SPECS.values() for x in backends(s) if x != "reference"],
)
def test_calls_from_several_threads_at_once(spec: OpSpec, backend: str) -> None:
    """Of several sizes, each with two threads: each gives what it gives alone."""
    calls = [(case, inputs_in(spec, case)) for case in largest(spec.cases, 3)]
    torch.set_num_threads(2)
    alone = [run(spec, case, inputs, backend) for case, inputs in calls]
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        torch.set_num_threads(2)
        try:
            for turn in range(4):
                which = (number + turn) % len(calls)
                _same(run(spec, *calls[which], backend), alone[which], exactly=True)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    assert not wrong, wrong[0]


@pytest.mark.alone
@needs_kernels
@pytest.mark.parametrize("before", ["results('cpu')", "torch.randn(200000).exp()"])
def test_a_forked_process_goes_on_alone(before: str) -> None:
    """OpenMP's threads do not survive a fork, ours or PyTorch's: a parallel region in the child waits for ever."""
    code = f"""
import os, torch
from mmkernels import attention_received, cross_attention, info_nce, retrieval_ranks, sigmoid_contrastive
torch.set_num_threads(2)
q, k, x = torch.randn(1, 4, 100, 32), torch.randn(1, 4, 200, 32), torch.nn.functional.normalize(torch.randn(300, 64))
y = x.flip(0).requires_grad_()
def results(backend):
    losses = info_nce(x, y, 9.0, backend=backend), sigmoid_contrastive(x, y, 9.0, -3.0, backend=backend)
    grads = [torch.autograd.grad(loss, y)[0].norm() for loss in losses]
    ranks = retrieval_ranks(x, y, torch.arange(300), backend=backend).sum()
    received = attention_received(q, k, backend=backend)
    return [*losses, *grads, ranks, received, cross_attention(q, k, k, backend=backend)]
want = results("chunked")
{before}
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results("cpu"), want)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ended = python(code)
    assert ended.stdout.strip() == "0", ended.stderr


# Where tensors lie in memory.


def _odd_offset(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


_EQUAL_ROWS, _EQUAL_QUERIES = "one row for all", "one query or head for all"
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns first": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., 1::2],
    "every third row": lambda x: x.repeat_interleave(3, 0)[1::3],
    "between NaN": embedded,
    "odd offset": _odd_offset,
    "rows last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "second dim first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    _EQUAL_ROWS: lambda x: x[:1].expand(x.shape),
    _EQUAL_QUERIES: lambda x: x[:, :1].expand(x.shape),
    "one channel for all": lambda x: x[..., :1].expand(x.shape),
}
_WAYS = [("chunked", torch.float64, "")]
_WAYS += [("cpu", dtype, isa) for dtype in DTYPES for isa in ISAS if cpu.why_not() is None]
_WAYS += [("triton", torch.float32, "")]


def _probes(spec: OpSpec) -> list[Case]:
    """Cases with many arguments, and one of each other number of dims."""
    dims = lambda case: max((x.dim() for x in _viewed(draw(case)).values()), default=1)
    cases = {dims(case): case for case in (*spec.cases, RICHEST[spec.name])}
    return list({case.id: case for case in (*cases.values(), UNSEEDED[spec.name])}.values())


def _layouts() -> list[tuple[Any, ...]]:
    # PyTorch's products may round equal queries of an image, or equal rows of a gallery, apart: then another one wins.
    queries = lambda case: any(x.dim() == 3 for x in _viewed(draw(case)).values())
    ties = lambda spec, case, layout: (
        (layout == _EQUAL_QUERIES and queries(case)) or (layout == _EQUAL_ROWS and spec.name == "retrieval_ranks")
    )
    odd = lambda case: any(x.shape[-1] % 2 for x in _viewed(draw(case)).values())
    return [
        (spec, case, layout, *way)
        for spec in SPECS.values()
        for case in {x.id: x for x in (*_probes(spec), *largest(filter(odd, spec.cases), 1))}.values()
        for layout in LAYOUTS
        for way in _WAYS
        if way[0] in backends(spec, way[1]) and not (way[0] == "chunked" and ties(spec, case, layout))
    ]


def _layout_axes(row: tuple[Any, ...]) -> dict[str, Any]:
    spec, case, layout, *way = row
    axes = {"op": spec.name, "layout": layout, "way": tuple(way)}
    return axes if gpu.INTERPRETED else axes | {"case": (spec.name, case.id)}


def _viewed(inputs: Inputs) -> dict[str, Tensor]:
    """What the layouts are for."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() > 1}


@pytest.mark.interpreted
@parametrize(
    "spec, case, layout, backend, dtype, isa",
    _layouts(),
    _layout_axes,
    ids=lambda row: "-".join((row[0].name, row[1].id, row[2], row[3], name_of(row[4]), row[5])).replace(" ", "_"),
    strength=1 if gpu.INTERPRETED else 2,
    once=None if gpu.INTERPRETED else "case",
)
def test_strides_change_no_result(
    spec: OpSpec, case: Case, layout: str, backend: str, dtype: torch.dtype, isa: str
) -> None:
    """No bit of a kernel's result; its gradients lie in memory as the fake says."""
    inputs = inputs_in(spec, case, dtype)
    views = inputs | {name: LAYOUTS[layout](x) for name, x in _viewed(inputs).items()}
    views |= {name: x.repeat_interleave(2)[::2] for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() == 1}
    copies = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in views.items()}
    with cpu.use_isa(isa or cpu.isas()[0]):
        found, want = (run(spec, case, x, backend) for x in (views, copies))
    _same(found, want, exactly=backend != "chunked")
    fake = run(spec, case, {name: _on_meta(x) for name, x in views.items()}, backend)
    assert [_strides(x) for x in found.grads.values()] == [_strides(x) for x in fake.grads.values()]


def _on_meta(x: Any) -> Any:
    """With the strides, which `to` does not keep."""
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x.to("meta") if isinstance(x, SpanMask) else x


def _strides(x: Tensor) -> list[int]:
    return [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(s, x, id=f"{s.name}-{x}") for s in SPECS.values() for x in backends(s) if x in ("cpu", "triton")],
)
def test_offsets_past_two_to_the_31(spec: OpSpec, backend: str) -> None:
    """Batches, heads and rows that lie 2^31 elements and more from where their tensor begins."""
    for case in _probes(spec) + ([] if gpu.INTERPRETED else largest(spec.cases, 1)):
        inputs = inputs_in(spec, case, torch.float16)
        want = run(spec, case, inputs, backend)
        for dim in range(max(x.dim() for x in _viewed(inputs).values()) - 1):
            views = {
                name: far_apart(x, dim) for name, x in _viewed(inputs).items() if dim < x.dim() - 1 and x.shape[dim] > 1
            }
            if views:
                _same(run(spec, case, inputs | views, backend), want, exactly=True)
