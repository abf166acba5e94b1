"""What may be done to deferred logits without computing them: looking at the shape, taking rows, scaling, casting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.integrations.patching.deferred_steps import Step
from mmkernels.integrations.patching.deferred_tensor import READ, DeferredLogits, handles, is_pending, version_of

_GETTERS = (
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_nested", "is_xpu", "is_mps", "is_mkldnn", "itemsize", "nbytes", "names",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "__len__", "__hash__",
    "is_floating_point", "is_complex", "is_inference", "get_device",
)  # fmt: skip


def _getter(name: str) -> Any:
    """Returns what PyTorch calls when a tensor's attribute is read."""
    return getattr(Tensor, name).__get__


_STATE = ("requires_grad", "grad_fn", "is_leaf", "output_nr")


@handles(
    *(_getter(name) for name in _GETTERS if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
)
def _described(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What does not depend on values."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(x, *args, **kwargs)


@handles(*(_getter(name) for name in _STATE))
def _recorded(func: Any, x: Any, *args: Any) -> Any:
    if not is_pending(x):
        return READ
    with torch._C.DisableTorchFunctionSubclass():
        return func(x, *args)


def stepped(x: DeferredLogits, step: Step, dtype: torch.dtype) -> Any:
    """Returns a function of deferred logits that does not mix rows."""
    if step.tensor is not None and step.tensor.requires_grad and torch.is_grad_enabled() and not x.source.recording:
        return READ
    x.source.check()
    found = DeferredLogits.of(x.source._replace(steps=(*x.source.steps, step), dtype=dtype))
    found.origin = x
    return found


def _of_rows(x: DeferredLogits, view: Callable[[Tensor], Tensor], shares: bool, **changes: Any) -> DeferredLogits:
    """Returns deferred logits of other rows.

    Args:
        view: what makes them of the logits.
        shares: whether it returns a view.
        changes: to the source.
    """
    x.source.check()
    source = x.source._replace(**changes)
    if "hidden" in changes and "versions" not in changes:
        source = source._replace(versions=(version_of(source.hidden), *source.versions[1:]))
    found = DeferredLogits.of(source)
    if shares:
        found.parent, found.seen_as = x, view
    return found


# Casts


@handles(Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to, Tensor.type, Tensor.type_as)
def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_pending(x):
        return READ
    wanted = _wanted(func, x, *args, **kwargs)
    if wanted is None:
        return READ
    dtype, device, copy = wanted
    if device is not None and device != x.device and device != torch.device(x.device.type):
        return READ
    if not dtype.is_floating_point:
        return READ
    return x if dtype == x.dtype and not copy else stepped(x, Step("cast", dtype), dtype)


_NAMED = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}
_NAMED[Tensor.double] = torch.float64


def _wanted(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[torch.dtype, torch.device | None, bool] | None:
    """Returns the dtype and device that a cast asks for, and whether it asks for a copy; None: something else."""
    if kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    if func in _NAMED:
        return _NAMED[func], None, False
    dtype, device = kwargs.get("dtype") or x.dtype, kwargs.get("device")
    for arg in (*args[:2], kwargs.get("other")):
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            dtype, device = arg.dtype, arg.device
        elif isinstance(arg, (str, torch.device, int)) and not isinstance(arg, bool) and func is Tensor.to:
            device = arg
        elif arg is not None and not isinstance(arg, bool):
            return None
    flags = [arg for arg in args if isinstance(arg, bool)]
    copy = bool(kwargs.get("copy", len(flags) > 1 and flags[1]))
    return dtype, None if device is None else torch.device(device), copy


# Scales, caps and biases


@handles(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.multiply, torch.multiply)
def _mul(func: Any, x: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return READ
    if is_pending(x) and is_pending(other):
        return _plogp(x, other)
    return _scaled("mul", x, other) if is_pending(x) else _scaled("mul", other, x)


@handles(Tensor.div, Tensor.__truediv__, torch.div, Tensor.divide, torch.divide, Tensor.true_divide, torch.true_divide)
def _div(func: Any, x: Any, other: Any, **kwargs: Any) -> Any:
    return READ if kwargs else _scaled("div", x, other)


def _scaled(kind: str, x: Any, by: Any) -> Any:
    if not is_pending(x):
        return READ
    if isinstance(by, (int, float)) and not isinstance(by, bool):
        return stepped(x, Step(kind, float(by)), x.dtype) if math.isfinite(by) and by != 0 else READ
    if not isinstance(by, Tensor) or isinstance(by, DeferredLogits) or by.numel() != 1 or by.dim() > x.dim():
        return READ
    if not by.is_floating_point() or by.device != x.device:
        return READ
    dtype = torch.promote_types(x.dtype, by.dtype) if by.dim() else x.dtype
    return stepped(x, Step(kind, by), dtype)


@handles(Tensor.tanh, torch.tanh, F.tanh)
def _tanh(func: Any, x: Any, **kwargs: Any) -> Any:
    return READ if kwargs or not is_pending(x) else stepped(x, Step("tanh"), x.dtype)


@handles(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _add(func: Any, x: Any, other: Any, **kwargs: Any) -> Any:
    if not is_pending(x):
        x, other = other, x
    if kwargs or not is_pending(x) or not isinstance(other, Tensor) or isinstance(other, DeferredLogits):
        return READ
    shape, last = other.shape, x.shape[-1]
    fits = other.dim() <= x.dim() and other.numel() in (1, last) and (other.numel() == 1 or shape[-1] == last)
    if not fits or not other.is_floating_point() or other.device != x.device or x.source.order is not None:
        return READ
    dtype = torch.promote_types(x.dtype, other.dtype) if other.dim() else x.dtype
    return stepped(x, Step("add", other.reshape(-1) if other.dim() else other), dtype)


def _plogp(x: DeferredLogits, other: DeferredLogits) -> Any:
    """Returns ``p log p`` of probabilities and log-probabilities of the same logits."""
    if len(x.source.steps) < len(other.source.steps):
        x, other = other, x
    probs, logprobs = x.source, other.source
    same = probs.hidden is logprobs.hidden and probs.weight is logprobs.weight and probs.order is logprobs.order
    steps = logprobs.steps
    if not same or not steps or steps[-1].kind != "log_softmax" or len(probs.steps) != len(steps) + 1:
        return READ
    if probs.steps[-1].kind != "exp" or any(a is not b for a, b in zip(probs.steps, steps, strict=False)):
        return READ
    return stepped(other, Step("times_log"), other.dtype)


# Rows


@handles(Tensor.__getitem__)
def _getitem(func: Any, x: Any, index: Any) -> Any:
    if not is_pending(x) or x.source.order is not None:
        return READ
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or _indexes(part) for part in parts):
        return READ
    if any(isinstance(part, DeferredLogits) for part in parts):
        return READ
    weight = slice(None)
    if _reaches_vocabulary(parts, x.dim()):
        weight, parts = parts[-1], (*parts[:-1], slice(None))
        if not isinstance(weight, slice):
            return READ
    source, basic = x.source, not any(isinstance(part, Tensor) for part in parts)
    changes: dict[str, Any] = {"hidden": source.hidden[parts]}
    if weight != slice(None):
        if any(step.kind in ("add", "log_softmax", "softmax") for step in source.steps):
            return READ
        changes["weight"] = source.weight[weight]
        changes["bias"] = None if source.bias is None else source.bias[weight]
    found = _of_rows(x, lambda values: values[index], basic, **changes)
    found.of_rows = isinstance(index, int)
    return found


def _indexes(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.dtype in (torch.bool, torch.int64, torch.int32)
    return isinstance(part, (int, slice)) and not isinstance(part, bool)


def _reaches_vocabulary(parts: tuple[Any, ...], dims: int) -> bool:
    """Returns whether the last part of an index is one of the vocabulary."""
    taken = [part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts]
    taken = [0 if part is None or part is ... else n for part, n in zip(parts, taken, strict=True)]
    dots = next((i for i, part in enumerate(parts) if part is ...), None)
    if dots is None:
        return sum(taken) >= dims
    return dots + 1 < len(parts) and any(taken[dots + 1 :])


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def _view(func: Any, x: Any, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or not is_pending(x) or x.source.order is not None:
        return READ
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not sizes or not all(isinstance(n, int) for n in sizes):
        return READ
    rows, last = math.prod(x.shape[:-1]), x.shape[-1]
    known = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) > 1 or known == 0 or rows == 0:
        return READ
    sizes = tuple(rows * last // known if n == -1 else n for n in sizes)
    if sizes[-1] != last or math.prod(sizes[:-1]) != rows:
        return READ
    hidden = x.source.hidden.reshape(*sizes[:-1], x.source.hidden.shape[-1])
    shares = func is Tensor.view or _dense(x)
    return _of_rows(x, lambda values: func(values, sizes), shares, hidden=hidden)


@handles(Tensor.flatten, torch.flatten)
def _flatten(func: Any, x: Any, start_dim: Any = 0, end_dim: Any = -1) -> Any:
    if (
        not is_pending(x)
        or x.source.order is not None
        or not isinstance(start_dim, int)
        or not isinstance(end_dim, int)
    ):
        return READ
    start, end = start_dim % x.dim(), end_dim % x.dim()
    if end >= x.dim() - 1 or start > end:
        return READ
    return _of_rows(x, lambda values: values.flatten(start, end), _dense(x), hidden=x.source.hidden.flatten(start, end))


@handles(Tensor.contiguous)
def _contiguous(func: Any, x: Any, memory_format: Any = torch.contiguous_format) -> Any:
    if not is_pending(x) or memory_format != torch.contiguous_format or x.source.order is not None:
        return READ
    return x if _dense(x) else _of_rows(x, Tensor.contiguous, False)


def _dense(x: DeferredLogits) -> bool:
    """Whether the logits would be contiguous: what a linear layer returns is, and slices are as slices of its input."""
    return x.parent is None or x.source.hidden.is_contiguous()


@handles(Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze)
def _squeeze(func: Any, x: Any, dim: Any = None) -> Any:
    if not is_pending(x) or x.source.order is not None or not isinstance(dim, int):
        return READ
    adds = func in (Tensor.unsqueeze, torch.unsqueeze)
    place = dim % (x.dim() + adds)
    if place >= x.dim() + adds - 1 or (adds and place >= x.dim()):
        return READ
    return _of_rows(x, lambda values: func(values, place), True, hidden=func(x.source.hidden, place))


@handles(Tensor.split, torch.split, Tensor.chunk, torch.chunk)
def _split(func: Any, x: Any, size: Any, dim: int = 0) -> Any:
    if not is_pending(x) or x.source.order is not None or dim % x.dim() == x.dim() - 1:
        return READ
    parts = func(x.source.hidden, size, dim)
    return tuple(_of_rows(x, _part(func, size, dim, i), True, hidden=part) for i, part in enumerate(parts))


def _part(func: Any, size: Any, dim: int, i: int) -> Callable[[Tensor], Tensor]:
    def part(values: Tensor) -> Tensor:
        found: Tensor = func(values, size, dim)[i]
        return found

    return part


@handles(Tensor.unbind, torch.unbind)
def _unbind(func: Any, x: Any, dim: int = 0) -> Any:
    if not is_pending(x) or x.source.order is not None or dim != 0 or x.dim() < 2:
        return READ
    return tuple(_getitem(func, x, i) for i in range(x.shape[0]))


@handles(Tensor.detach, torch.detach, _getter("data"))
def _detach(func: Any, x: Any) -> Any:
    if not is_pending(x):
        return READ
    tensors = [tensor.detach() for tensor in x.source.tensors]
    return _of_rows(x, Tensor.detach, True, **x.source.with_tensors(tensors)._replace(recording=False)._asdict())


@handles(Tensor.clone, torch.clone)
def _clone(func: Any, x: Any, **kwargs: Any) -> Any:
    """A copy of what is not computed; DDP makes one of each output where parameters may be unused."""
    if not is_pending(x) or kwargs:
        return READ
    return _of_rows(x, torch.clone, False)


# Transposes


@handles(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def _transpose(func: Any, x: Any, first: Any, second: Any) -> Any:
    if not isinstance(x, DeferredLogits) or not isinstance(first, int) or not isinstance(second, int):
        return READ
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return _permuted(x, tuple(order))


@handles(Tensor.t, torch.t, *(_getter(name) for name in ("T", "mT", "H")))
def _t(func: Any, x: Any, *args: Any) -> Any:
    return _permuted(x, (1, 0)) if isinstance(x, DeferredLogits) and x.dim() == 2 else READ


@handles(Tensor.permute, torch.permute)
def _permute(func: Any, x: Any, *dims: Any) -> Any:
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    if not isinstance(x, DeferredLogits) or len(order) != x.dim() or not all(isinstance(n, int) for n in order):
        return READ
    return _permuted(x, tuple(n % x.dim() for n in order))


def _permuted(x: DeferredLogits, order: tuple[int, ...]) -> Any:
    if not is_pending(x):
        return READ
    source = x.source
    if order == (1, 0) and source.bias is None and all(step.kind in ("cast", "mul", "div") for step in source.steps):
        hidden, weight, bias = source.versions  # of the product of two matrices either is the weight
        versions = weight, hidden, bias
        return _of_rows(x, Tensor.t, True, hidden=source.weight, weight=source.hidden, versions=versions)
    whole = order if source.order is None else tuple(source.order[n] for n in order)
    return _of_rows(x, lambda values: values.permute(order), True, order=None if _sorted(whole) else whole)


def _sorted(order: tuple[int, ...]) -> bool:
    return order == tuple(range(len(order)))
