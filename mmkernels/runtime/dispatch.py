"""Which backend runs a call, and why not the others.

An op is one boundary ``torch.ops.mmkernels.<name>`` with a last argument ``backend: str``. Its body walks the op's
ordered table of backends and runs the first whose `why_not` has no objection; ``backend != ""`` forces one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

BACKENDS = ("cuda", "triton", "cpu", "chunked", "reference")
"""Every backend's name, the fastest first."""

LIBRARY = torch.library.Library("mmkernels", "FRAGMENT")

TABLES: dict[str, tuple[Backend, ...]] = {}
"""Each op boundary's backends in the order in which they are tried: what the body walks and ``doctor`` prints."""


def something_watches() -> bool:
    """Whether a transform, mode, autocast level or tracer is active in this thread."""
    return bool(
        _peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


try:  # looked up once: a call asks in less than a microsecond
    _peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
    _len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
    _is_any_autocast_enabled = torch._C._is_any_autocast_enabled
    _get_tracing_state = torch._C._get_tracing_state
except AttributeError:  # a torch that calls them otherwise: every call takes the boundary

    def something_watches() -> bool:
        return True


_choice = threading.local()  # not a ContextVar: reading one breaks torch.compile(fullgraph=True)
_removed = False  # not thread-local: the backward pass of CUDA tensors runs in another thread


class BackendError(RuntimeError):
    """No backend can run the call, or the forced one can't; the message says why."""


def _no_objection(*args: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: one of `BACKENDS`.
        run: the kernel; takes the op's arguments without ``backend``.
        why_not: takes the same arguments and answers why this call can't run here, or None; without arguments, why no
            call can.
    """

    name: str
    run: Callable[..., Any]
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
    if name != "" and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None; got {name!r}")
    return name


def resolve(backend: str | None) -> str:
    """The choice that a public function passes through the op boundary."""
    return getattr(_choice, "name", "") if backend is None else check_backend(backend)


def choose(op: str, backend: str, args: Sequence[Any], *, forced_may_fall_back: bool = False) -> Backend:
    """The first backend of `op` that can run this call; with ``backend != ""`` only that one.

    Args:
        forced_may_fall_back: a backward pass takes the choice made for its forward as a wish, not an order.
    """
    reasons = []
    for entry in TABLES[op]:
        if backend in ("", entry.name):
            reason = entry.why_not(*args)
            if reason is None:
                return entry
            reasons.append(f"{entry.name}: {reason}")
    if backend and forced_may_fall_back:
        return choose(op, "", args)
    if not reasons:
        offered = ", ".join(entry.name for entry in TABLES[op])
        raise BackendError(f"{op} has no backend {backend!r}; it has {offered}")
    raise BackendError(f"{op} can't run this call. " + "; ".join(reasons))


def register(
    schema: str,
    backends: Sequence[Backend],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    is_backward: bool = False,
) -> Callable[..., Any]:
    """Define the op boundary ``torch.ops.mmkernels.<name>`` and return a function that calls it.

    Args:
        schema: as ``torch.library.define`` takes it, ``name(Tensor x, ..., str backend) -> Tensor``, no defaults.
        backends: in the order in which they are tried.
        fake: shapes, dtypes and strides of the outputs, the same for every backend; takes all arguments.
        setup_context, backward: as ``torch.library.register_autograd`` takes them; None: no gradient.
        is_backward: this is another op's backward pass, where a forced backend may fall back.
    """
    name = schema.partition("(")[0]
    TABLES[name] = tuple(backends)
    LIBRARY.define(schema)

    def body(*args: Any) -> Any:
        if _removed:
            return _map_tensors(Tensor.zero_, fake(*args))
        entry = choose(name, args[-1], args[:-1], forced_may_fall_back=is_backward)
        with torch._C._DisableAutocast():  # the public function has cast what is to be cast
            return entry.run(*args[:-1])

    qualified = f"mmkernels::{name}"
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.mmkernels, name).default
    torch.library.register_vmap(qualified, _loop_over(op), lib=LIBRARY)

    class Recorded(torch.autograd.Function):
        """What `register_autograd` makes of the boundary, for calls that need nothing but a gradient."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs = args[:-1]
            outputs = choose(name, args[-1], inputs, forced_may_fall_back=is_backward).run(*inputs)
            assert setup_context is not None
            setup_context(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            assert backward is not None
            return backward(ctx, *grads)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        wanted = _gradient_wanted(args)
        if wanted is False:
            inputs = args[:-1]
            return choose(name, args[-1], inputs, forced_may_fall_back=is_backward).run(*inputs)
        if wanted is True and backward is not None:
            return Recorded.apply(*args)
        if _in_grad_transform() or _has_tangent(args):
            raise NotImplementedError(
                f"{name} can't be differentiated by torch.func (grad, vjp, jvp, jacrev, ...) or in forward mode, which "
                'PyTorch does not offer to custom operators; use torch.autograd, or backend="reference"'
            )
        return op(*args)

    return call


def _gradient_wanted(args: Sequence[Any]) -> bool | None:
    """Whether a call must be recorded for a gradient; None: there is more to it than plain tensors in eager mode.

    What has no transform or mode goes straight to its kernel, or through one autograd function: the boundary's own
    layers of Python would cost 20 us, or 80 with a backward pass, which is more than a small call's kernels.
    """
    if _removed or args[0].is_meta or something_watches():
        return None
    wanted, recording = False, torch.is_grad_enabled()
    for x in args:
        kind = type(x)
        if x is None or kind is float:
            continue
        if kind is Tensor or kind is Parameter:
            wanted = wanted or (recording and x.requires_grad)
        elif isinstance(x, Tensor):
            return None
    return wanted


@contextmanager
def removed() -> Iterator[None]:
    """Every op answers zeros at once: the time of a model without them, which bounds what any kernel can gain."""
    global _removed
    _removed = True
    try:
        yield
    finally:
        _removed = False


def _loop_over(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule for any op: one call for each slice. Right for every argument; fast where slices are large."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        calls = [
            op(*(x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x for x, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _in_grad_transform() -> bool:
    stack = torch._C._functorch.get_interpreter_stack()
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return stack is not None and any(level.key() in kinds for level in stack)


def _has_tangent(args: Sequence[Any]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args)


def _map_tensors(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    return function(outputs) if isinstance(outputs, Tensor) else tuple(function(x) for x in outputs)
