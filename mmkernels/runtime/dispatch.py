"""Which backend runs a call, and why not the others; how an op is defined.

An op is one boundary ``torch.ops.mmkernels.<name>`` of its record's fields and a last argument ``backend: str``. Its
body walks the op's ordered table of backends and runs the first whose `why_not` has no objection; ``backend != ""``
forces one. Its backward pass is an op of its own, whose table is walked again with the forward's choice: a second
derivative needs a boundary there, and a pass may run elsewhere (decoding runs forward on "cuda", backward on "triton").

`eager.py` holds the short way that most calls take, and why there is one; `gradient.py` what autograd needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mmkernels.runtime import cpu, eager
from mmkernels.runtime.arguments import Layout, lay_out, lay_out_backward, result_types
from mmkernels.runtime.gradient import Gradient, Link, SecondLink

BACKENDS = ("cuda", "triton", "cpu", "chunked", "reference")
"""Every backend's name, the fastest first."""

LIBRARY = torch.library.Library("mmkernels", "FRAGMENT")

TABLES: dict[str, tuple[Backend, ...]] = {}
"""Each op boundary's backends in the order in which they are tried: what the body walks and ``doctor`` prints."""

Run = Callable[[Any], Any]
"""A backend's function: record -> outputs."""


# `name`: of the backend that `use_backend` forces in this thread. Not a ContextVar: reading one breaks
# torch.compile(fullgraph=True). Not of a subclass: TorchDynamo writes to an instance's own dict, which no thread reads.
_choice = threading.local()
_choice.name = ""  # in the main thread, where a missing name would cost 0.3 us a call


class BackendError(RuntimeError):
    """No backend can run the call, or the forced one can't; the message says why."""


def _no_objection(inputs: Any = None) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: one of `BACKENDS`.
        run: record -> outputs. A kernel of the CPU extension gets its schema from the op.
        why_not: record -> why this call can't run here, or None; without one, why no call can.
    """

    name: str
    run: Run
    why_not: Callable[..., str | None] = _no_objection


class use_backend:
    """Force a backend for every op called in this thread inside the ``with`` block.

    Args:
        name: one of `BACKENDS`, or "" for the automatic choice.

    Raises:
        ValueError: no such backend. A forced backend that can't run a call raises `BackendError` there.

    Example:
        >>> import torch, mmkernels
        >>> q = torch.randn(1, 2, 3, 8)
        >>> with mmkernels.use_backend("reference"):
        ...     out = mmkernels.cross_attention(q, q, q)
    """

    def __init__(self, name: str) -> None:
        self.name = check_backend(name)
        self._previous: list[str] = []  # one block may be entered again inside itself

    def __enter__(self) -> None:
        self._previous.append(getattr(_choice, "name", ""))
        _choice.name = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choice.name = self._previous.pop()


def check_backend(name: str) -> str:
    """Returns `name`; raises ValueError unless it is "" or a backend's."""
    if name != "" and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None; got {name!r}")
    return name


def resolve(backend: str | None) -> str:
    """Returns the choice that a public function passes through the op boundary."""
    return getattr(_choice, "name", "") if backend is None else check_backend(backend)


def choose(op: str, backend: str, inputs: Any, *, forced_may_fall_back: bool = False) -> Backend:
    """Returns the first backend of `op` that can run this call; with ``backend != ""`` only that one.

    Args:
        inputs: the op's record.
        forced_may_fall_back: a backward pass takes the choice made for its forward as a wish, not an order.
    """
    table = TABLES[op]
    for entry in table:
        if (backend == "" or backend == entry.name) and entry.why_not(inputs) is None:
            return entry
    if backend and forced_may_fall_back:
        return choose(op, "", inputs)
    asked = [entry for entry in table if backend in ("", entry.name)]
    if not asked:
        raise BackendError(f"{op} has no backend {backend!r}; it has {', '.join(entry.name for entry in table)}")
    reasons = "; ".join(f"{entry.name}: {entry.why_not(inputs)}" for entry in asked)
    raise BackendError(f"{op} can't run this call. {reasons}")


class Op:
    """An op boundary with its backends; calling it is what a public function ends with.

    Args:
        name: of the boundary.
        layout: of its record.
        results: how many tensors it returns.
        backends: in the order in which they are tried.
        fake: record -> outputs of the right shapes, dtypes and strides, the same for every backend.
        link: what autograd needs; None: no gradient.
        falls_back: a forced backend that can't run may be replaced.
    """

    symbolic: Symbolic | None = None  # the boundary for numbers that a graph does not know; an op without numbers: None

    def __init__(
        self,
        name: str,
        layout: Layout,
        results: int,
        backends: Sequence[Backend],
        fake: Callable[[Any], Any],
        link: Link | None,
        falls_back: bool = False,
    ) -> None:
        self.name, self.layout, self.fake = name, layout, fake
        self.choose = partial(choose, name, forced_may_fall_back=falls_back)
        TABLES[name] = tuple(self._bound(entry, results) for entry in backends)
        self.boundary = _define_boundary(name, layout, results, self.body, fake, link)
        self.recorded = None if link is None else eager.record(self, link)
        self.transformed = None if link is None else eager.transformable(self, link)

    def _bound(self, entry: Backend, results: int) -> Backend:
        if isinstance(entry.run, cpu.Kernel):
            return replace(entry, run=entry.run.bind(self.layout.schema, results))
        return entry

    __call__ = eager.call

    def body(self, *values: Any) -> Any:
        inputs = self.layout.record._make(values[:-1])
        if eager.stubbed():
            return _map_tensors(Tensor.zero_, self.fake(inputs))
        if self.recorded is not None and eager.has_tangent(self.layout.take_tensors(inputs)):
            raise NotImplementedError(
                f"{self.name} in a graph has no derivative in forward mode; compile the function within the dual level"
            )
        with torch._C._DisableAutocast():  # the public function has cast what is to be cast
            return self.choose(values[-1], inputs).run(inputs)


class Symbolic:
    """A second boundary of an op, ``torch.ops.mmkernels.<name>_symbolic``, with a 0-D tensor for each number.

    A schema's float is a constant of the graph that ``torch.compile`` makes: a number that changes from call to call,
    or is computed from a shape, would have the graph compiled again for each value. Of a tensor the graph knows only
    that it is one.

    Args:
        op: whose body computes it.
        results: how many tensors the op returns.
        link: of the op's inputs with tensors for numbers; None: no gradient.
    """

    def __init__(self, op: Op, results: int, link: Link | None) -> None:
        layout = op.layout.with_tensors_for_numbers()
        places = {op.layout.names.index(name) for name in op.layout.numbers}

        def body(*values: Any) -> Any:
            return op.body(*(float(x) if place in places else x for place, x in enumerate(values)))

        self.boundary = _define_boundary(f"{op.name}_symbolic", layout, results, body, op.fake, link)

    def __call__(self, inputs: Any, backend: str) -> Any:
        one: Any = torch.ones((), dtype=torch.float64, device="cpu")
        # A product with a tensor is what the compiler can turn into a graph that takes the number as an input.
        return self.boundary(*(one * x if isinstance(x, (float, torch.SymFloat)) else x for x in inputs), backend)


def _define_boundary(
    name: str,
    layout: Layout,
    results: int,
    body: Callable[..., Any],
    fake: Callable[[Any], Any],
    link: Link | None,
) -> torch._ops.OpOverload:
    """Define ``torch.ops.mmkernels.<name>``; see `Op`."""
    qualified = f"mmkernels::{name}"
    LIBRARY.define(f"{name}({layout.schema}, str backend) -> {result_types(results)}")
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, lambda *values: fake(layout.record._make(values[:-1])), lib=LIBRARY)
    boundary: torch._ops.OpOverload = getattr(torch.ops.mmkernels, name).default
    torch.library.register_vmap(qualified, partial(eager.loop, boundary), lib=LIBRARY)
    if link is not None:
        torch.library.register_autograd(qualified, link.backward, setup_context=link.setup_context, lib=LIBRARY)
    return boundary


def define(
    name: str,
    inputs: type[Any],
    outputs: type[Any],
    *,
    backends: Sequence[Backend],
    fake: Callable[[Any], Any],
    gradient: Gradient | None = None,
) -> Op:
    """Define the op boundary ``torch.ops.mmkernels.<name>``, and that of its backward pass ``<name>_backward``.

    Args:
        inputs, outputs: NamedTuple classes, see `arguments.py`; an op with one output returns it as it is.
        backends: in the order in which they are tried.
        fake: record -> outputs of the right shapes, dtypes and strides, the same for every backend.
        gradient: how the op is differentiated; None: it has no gradient.
    """
    layout, given = lay_out(inputs), lay_out(outputs)
    results, wide = len(given.fields), layout.with_tensors_for_numbers()
    link = symbolic_link = None
    if gradient is not None:
        link = _link(name, layout, given, gradient)
        symbolic_link = _link(name, wide, given, gradient)
        if gradient.backends:
            count = len(layout.differentiable)
            second = SecondLink(link)
            run = Op(f"{name}_backward", link.record, count, gradient.backends, link.fake, second, falls_back=True)
            link.run = run
            symbolic_link.run = Symbolic(run, count, None) if layout.numbers else None
    op = Op(name, layout, results, backends, fake, link)
    op.symbolic = Symbolic(op, results, symbolic_link) if layout.numbers else None
    return op


def _link(name: str, layout: Layout, given: Layout, gradient: Gradient) -> Link:
    return Link(layout, given, lay_out_backward(name, layout, given, gradient.saves), gradient)


def _map_tensors(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    return function(outputs) if isinstance(outputs, Tensor) else tuple(function(x) for x in outputs)
