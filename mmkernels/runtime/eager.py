"""The short way of an eager call to its kernel.

The boundary's own layers of Python cost 20 us a call, or 80 with a backward pass, which is more than a small call's
kernels take. A call on plain tensors, with no transform, mode, autocast or tracer active, needs none of them: it goes
straight to its backend, or through one autograd function. Every other call takes the boundary. ADR 4 has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

if TYPE_CHECKING:
    from mmkernels.runtime.dispatch import Op
    from mmkernels.runtime.gradient import Link

_stubbed = False  # not thread-local: the backward pass of CUDA tensors runs in another thread


def transform_active() -> bool:
    """Returns whether a transform, mode, autocast level or tracer is active in this thread."""
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
except AttributeError:  # a torch that names them differently: every call takes the boundary

    def transform_active() -> bool:
        return True


try:
    _key_included = torch._C._dispatch_tls_is_dispatch_key_included
    _BATCHED_COTANGENTS = torch._C._dispatch_key_parse("VmapMode")
except (AttributeError, RuntimeError):  # a torch that names them differently

    def cotangents_are_batched() -> bool:
        return True

else:

    def cotangents_are_batched() -> bool:
        """Returns whether autograd runs a backward pass for several cotangents at once (``is_grads_batched``).

        It does so by a vmap of its own, which `transform_active` does not see, on tensors whose type is ``Tensor``.
        """
        return _key_included(_BATCHED_COTANGENTS)


def call(op: Op, inputs: Any, backend: str) -> Any:
    """Returns an op's outputs.

    Under ``torch.func``'s reverse-mode transforms the op's own kernels run, within ``torch.vmap`` slice by slice. In
    forward mode the naive formula runs: no kernel computes a derivative in that direction.

    Raises:
        NotImplementedError: a backend is forced for a call that is differentiated in forward mode.
    """
    if torch.compiler.is_compiling():
        if op.transformed is not None and _is_traced_in_a_transform():
            return _naive(op, inputs, backend)
        return _cross(op, inputs, backend)
    tensors = op.layout.take_tensors(inputs)
    wanted = None if _stubbed or transform_active() else _gradient_wanted(tensors)
    if wanted is False:
        return op.choose(backend, inputs).run(inputs)
    if wanted and op.recorded is not None:
        return op.recorded(*inputs, backend)
    if op.transformed is not None:
        if in_forward_mode(tensors):
            return _naive(op, inputs, backend)
        if _transform() == "reverse":
            return op.transformed(*inputs, backend)
    return _cross(op, inputs, backend)


def record(op: Op, link: Link) -> Any:
    """Returns a function from an op's values and its backend to its outputs, with the gradient that `link` describes.

    It does what ``register_autograd`` makes of the boundary, for calls that need nothing but a gradient.
    """

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            inputs = op.layout.record._make(values[:-1])
            outputs = op.choose(values[-1], inputs).run(inputs)
            link.setup_context(ctx, values, outputs)
            return outputs

        backward = staticmethod(link.backward)

    # The base class's method: `Function.apply` first looks for transforms, of which there are none here, for 3 us.
    return super(torch.autograd.Function, Recorded).apply


def transformable(op: Op, link: Link) -> Any:
    """Returns what `record` returns, for calls within ``torch.func``'s transforms."""

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*values: Any) -> Any:
            return call(op, op.layout.record._make(values[:-1]), values[-1])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple[Any, Any]:
            return loop(Transformed.apply, info, in_dims, *values)

        setup_context = staticmethod(link.setup_context)
        backward = staticmethod(link.backward)

    return Transformed.apply


def loop(function: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *values: Any) -> tuple[Any, Any]:
    """A vmap rule for any op: one call for each slice. Right for every argument; fast where slices are large."""
    calls = [
        function(
            *(
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(values, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
    return stacked, (0,) * len(stacked)


@contextmanager
def stub_ops() -> Iterator[None]:
    """Every op returns zeros at once: the time of a model without its ops, which bounds what any kernel can gain."""
    global _stubbed
    _stubbed = True
    try:
        yield
    finally:
        _stubbed = False


def stubbed() -> bool:
    """Returns whether `stub_ops` is active."""
    return _stubbed


def _cross(op: Op, inputs: Any, backend: str) -> Any:
    """Returns an op's outputs by its boundary: the one whose numbers are tensors, if the graph does not know one."""
    if op.symbolic is not None and _has_symbol(inputs):
        return op.symbolic(inputs, backend)
    return op.boundary(*inputs, backend)


def _has_symbol(inputs: Any) -> bool:
    """Returns whether a number is not a constant of the graph that is being traced."""
    if not torch.compiler.is_compiling():
        return any(isinstance(x, torch.SymFloat) for x in inputs)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # what traces has imported it, which takes long

    # TorchDynamo shows a SymFloat as a float.
    return not all(has_static_value(x) for x in inputs if isinstance(x, (float, torch.SymFloat)))


def _gradient_wanted(tensors: tuple[Tensor | None, ...]) -> bool | None:
    """Returns whether a call must be recorded; None: a tensor has no storage, or a subclass that may watch the op."""
    first = tensors[0]
    if first is None or first.is_meta:
        return None
    wanted, recording = False, torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        kind = type(x)
        if kind is not Tensor and kind is not Parameter:
            return None
        if recording and x.requires_grad:
            wanted = True
    return wanted


def _naive(op: Op, inputs: Any, backend: str) -> Any:
    """Returns an op's outputs by the naive formula in PyTorch's own operators, which have every derivative."""
    if backend not in ("", "reference"):
        raise NotImplementedError(
            f"{op.name} must have backend=None to be differentiated in forward mode (jvp, jacfwd, hessian) or by "
            f"torch.func in compiled code, which only the naive formula can be; got {backend!r}"
        )
    run = op.choose("reference", inputs).run
    if torch.compiler.is_compiling():  # TorchDynamo knows neither `leading` nor `_DisableAutocast`
        with torch.autocast(inputs[0].device.type, enabled=False):
            return run(inputs)
    with torch._C._DisableAutocast():
        return run(inputs)


def _transform() -> str:
    """Returns whether a transform of ``torch.func`` differentiates the call, "forward" or "reverse"; "": none does."""
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return ""
    kinds = [level.key() for level in stack]
    transforms = torch._C._functorch.TransformType
    return "forward" if transforms.Jvp in kinds else "reverse" if transforms.Grad in kinds else ""


def _is_traced_in_a_transform() -> bool:
    """Returns whether the graph that is being traced differentiates its calls by ``torch.func`` or in forward mode."""
    return _transform() != "" or forward_ad._current_level >= 0


# TorchDynamo, which enters the transforms that it traces, calls it and takes its result for a constant of the graph.
# `torch.compiler.assume_constant_result` sets the same, but imports TorchDynamo.
_is_traced_in_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_forward_mode(tensors: tuple[Tensor | None, ...]) -> bool:
    """Returns whether a call is differentiated in forward mode, by ``torch.func`` or as dual numbers."""
    return _transform() == "forward" or has_tangent(tensors)


def has_tangent(tensors: tuple[Tensor | None, ...]) -> bool:
    """Returns whether a tensor is a dual number of forward mode."""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
