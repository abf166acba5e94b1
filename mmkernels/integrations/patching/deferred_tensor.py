"""Logits that are computed when something reads them: a tensor that holds a linear layer's input and weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from mmkernels.integrations.patching.deferred_steps import Step

HANDLERS = dict[Any, Callable[..., Any]]()
"""PyTorch's functions that need not read the logits -> ours, which return `READ` for arguments that do need them."""
READ = object()
_LATE = (
    "logits must be read before {}: mmkernels.patch computes them when they are read; read them earlier, or "
    "mmkernels.unpatch(model)"
)


class Source(NamedTuple):
    """What logits are computed from.

    Args:
        hidden: ``[..., d]``.
        weight: ``[V, d]``.
        bias: ``[V]`` or None.
        steps: what was done to the logits since.
        order: of the dims of ``[..., V]`` in the result; None: as they are.
        dtype: of the result.
        autocast: the dtype to which autocast casts the linear layer's inputs; None: it does not.
        recording: whether autograd records how the logits come about.
        versions: of hidden, weight and bias when the layer was called; -1: not known.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[Step, ...]
    order: tuple[int, ...] | None
    dtype: torch.dtype
    autocast: torch.dtype | None
    recording: bool
    versions: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (*self.hidden.shape[:-1], self.weight.shape[0])
        return shape if self.order is None else tuple(shape[dim] for dim in self.order)

    @property
    def strides(self) -> tuple[int, ...]:
        strides, step = list[int](), 1
        for n in reversed((*self.hidden.shape[:-1], self.weight.shape[0])):
            strides.insert(0, step)
            step *= max(n, 1)
        return tuple(strides if self.order is None else (strides[dim] for dim in self.order))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a gradient may flow to."""
        found = (self.hidden, self.weight, self.bias, *(step.tensor for step in self.steps))
        return tuple(x for x in found if x is not None)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Source:
        """Returns the source with others in place of `tensors`."""
        waiting = list(tensors)
        hidden, weight = waiting.pop(0), waiting.pop(0)
        bias = None if self.bias is None else waiting.pop(0)
        steps = tuple(step if step.tensor is None else step._replace(value=waiting.pop(0)) for step in self.steps)
        return self._replace(hidden=hidden, weight=weight, bias=bias, steps=steps)

    def check(self) -> None:
        """Raise RuntimeError if the logits can't be computed any more."""
        for name, x, version in zip(("input", "weight", "bias"), self[:3], self.versions, strict=True):
            if x is None:
                continue
            if version >= 0 and version != version_of(x):
                raise RuntimeError(
                    _LATE.format(f"the {name} of the output layer is changed, as the optimiser's step does")
                )
            if x.numel() and x.device.type != "meta" and not x.untyped_storage().size():
                raise RuntimeError(
                    _LATE.format(f"the {name} of the output layer is freed, as FSDP does after the layer")
                )

    def autocasting(self) -> Any:
        """Returns the context of the layer's call."""
        device = self.hidden.device.type
        if self.autocast is None:
            return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        return torch.autocast(device, dtype=self.autocast)

    def compute(self) -> Tensor:
        """Returns the logits."""
        self.check()
        with torch.set_grad_enabled(self.recording):
            with self.autocasting():
                x = F.linear(self.hidden, self.weight, self.bias)
            for step in self.steps:
                x = step(x)
            return x if self.order is None else x.permute(self.order)


def version_of(x: Tensor | None) -> int:
    """Returns how often a tensor was written to; -1: it does not count."""
    return -1 if x is None or x.is_inference() else x._version


class DeferredLogits(Tensor):
    """Logits ``[..., V]`` of a linear layer that are computed, once, when something needs their values.

    What only needs their loss, the log-probability of chosen tokens, their entropy or the best token has `HANDLERS`,
    which run a linear op that never stores them. Slices and views of rows, scales, casts and caps stay deferred.
    A tensor to all that asks: its gradient flows to the layer's input, weight and bias whatever is done with it.
    """

    source: Source
    parent: DeferredLogits | None  # whose memory they share
    seen_as: Callable[[Tensor], Tensor]  # of the parent: these logits
    origin: DeferredLogits | None  # of which they are a function, by the last of their steps
    computed: Tensor | None  # the logits, when they have been computed
    written: int  # how often they were written to when they were computed
    of_rows: bool  # whether `seen_as` is one of the rows alone
    lse: Tensor | None  # [...] the rows' log-sum-exp, where it is known
    node: Any  # its function in autograd's graph, as it was made

    @staticmethod
    def of(source: Source) -> DeferredLogits:
        """Returns the logits of a source, not computed."""
        recording = source.recording and torch.is_grad_enabled() and any(x.requires_grad for x in source.tensors)
        source = source._replace(recording=recording)
        found: DeferredLogits = _Attach.apply(source, *source.tensors) if recording else _wrapper(source)
        with torch._C.DisableTorchFunctionSubclass():
            found.node = found.grad_fn
        return found

    @property
    def pending(self) -> bool:
        """Whether they are not computed, and are what the source says: nothing has written to them."""
        if self.computed is not None or (self.parent is not None and not self.parent.pending):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is self.node

    def read(self, to_write: bool = False) -> Tensor:
        """Returns the logits, computed now if they never were.

        Args:
            to_write: the caller may write to them, which the logits whose memory they share must show.
        """
        with torch._C.DisableTorchFunctionSubclass():
            node, recorded = self.grad_fn, self.requires_grad
        if node is not self.node:
            # A function of autograd that was given the logits has made them its own: their gradient flows through it.
            with torch.set_grad_enabled(recorded):
                self.computed, self.node = _Read.apply(self), node
        if self.computed is None:
            self.computed = self._computed(to_write)
            self.written, self.origin = version_of(self.computed), None
        return self.computed

    def _computed(self, to_write: bool) -> Tensor:
        with torch.set_grad_enabled(self.source.recording):
            if self.parent is not None and (to_write or not self.parent.pending):
                return self.seen_as(self.parent.read(to_write))
            if self.origin is not None and self.origin.as_made:
                return self.source.steps[-1](self.origin.read())
        return self.source.compute()

    @property
    def as_made(self) -> bool:
        """Whether nothing has written to them."""
        return self.pending or (self.computed is not None and self.written == version_of(self.computed))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What no Python function was asked for: a function of autograd in C++, below which nothing is recorded."""
        args, kwargs = tree_map(lambda x: _data(x) if isinstance(x, DeferredLogits) else x, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


@torch.compiler.disable  # TorchDynamo would trace it where a graph that takes deferred logits breaks
def _called(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns what a function of PyTorch returns for deferred logits among its arguments."""
    handler = HANDLERS.get(func)
    if handler is not None:
        result = handler(func, *args, **kwargs)
        if result is not READ:
            return result
    writes = _writes(func)
    args, kwargs = tree_map(lambda x: x.read(writes) if isinstance(x, DeferredLogits) else x, (args, kwargs))
    return func(*args, **kwargs)


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the handler of PyTorch's, which is its first argument; see `HANDLERS`."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def is_pending(x: object) -> bool:
    """Returns whether x is logits that are not computed."""
    return isinstance(x, DeferredLogits) and x.pending


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in ("__index__", "__int__"))
    return name.endswith("_")


def _data(x: DeferredLogits) -> Tensor:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if x.computed is None:
            x.computed = x.source.compute()
        return x.computed.detach()


def _wrapper(source: Source) -> DeferredLogits:
    x: DeferredLogits = Tensor._make_wrapper_subclass(
        DeferredLogits, source.shape, strides=source.strides, dtype=source.dtype, device=source.hidden.device
    )
    x.source, x.parent, x.origin, x.computed, x.lse, x.node = source, None, None, None, None, None
    x.written, x.of_rows = 0, False
    return x


class _Attach(torch.autograd.Function):
    """Makes deferred logits a result of what they will be computed from, in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, source: Source, *tensors: Tensor) -> DeferredLogits:
        ctx.source = source
        return _wrapper(source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        copies = [x.detach().requires_grad_(need) for x, need in zip(ctx.source.tensors, needed, strict=True)]
        with torch.enable_grad():
            logits = ctx.source.with_tensors(copies).compute()
        found = iter(torch.autograd.grad(logits, [x for x in copies if x.requires_grad], grad))
        return None, *(next(found) if need else None for need in needed)


class _Read(torch.autograd.Function):
    """The values of deferred logits, whose gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, x: DeferredLogits) -> Tensor:
        return _data(x).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
