"""`ModelMask`: the object that a model gets as its attention mask, and what the model may do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.transformers.counts import count_conversion
from mmkernels.masks import SpanMask

Visible = SpanMask | Tensor | None
"""What a mask shows: spans; or a bool matrix; or everything (None)."""

NAME = "mmkernels"
"""The name by which models are set to the attention function."""

USE_ANOTHER = (
    'use attn_implementation="eager" there (or "sdpa" where the model takes it); a model with several parts can have '
    'one for each: set_attn_implementation({"text_config": "mmkernels", "vision_config": "eager"})'
)

_MOVES = {
    *("getitem", "narrow", "select", "index_select", "chunk", "split", "unbind"),
    *("view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to"),
    *("repeat", "repeat_interleave", "transpose", "permute", "movedim", "swapaxes"),
    *("cat", "concat", "stack"),
}
"""Operators that move elements and change none. Their results are masks again."""

_BOOL_ARGUMENT = {
    "where": (0, "condition"),
    "masked_fill": (1, "mask"),
    "scaled_dot_product_attention": (3, "attn_mask"),
}
"""Operators that take a bool in this place, or read True as visible: the model must know that the mask is bool."""

_BOOL_ALONE = {"and", "rand", "or", "ror", "invert", "bitwise_and", "bitwise_or", "bitwise_not"}
"""Operators that numbers lack, so that the model must know that the mask is bool."""

_NAMES = {
    getattr(place, name): name
    for place in (torch, torch.nn.functional, Tensor)
    for name in sorted({*_MOVES, *_BOOL_ARGUMENT, *_BOOL_ALONE})
    if hasattr(place, name)
} | {Tensor.__setitem__: "__setitem__"}
"""Operators by function: TorchDynamo knows no function's ``__name__``."""


class ModelMask:
    """A mask that only the attention function of ``"mmkernels"`` applies; a model sees a bool ``[B, 1, Lq, Lk]``.

    Most models only pass the mask to their attention. What else a model may do with it:

    - Slice, expand or join it. The result is a `ModelMask` too; the matrix that this takes is counted.
    - Use it as a bool, where PyTorch takes no numbers: ``mask & other``, ``~mask``, ``torch.where(mask, ...)``,
      ``scores.masked_fill(~mask, ...)``, ``F.scaled_dot_product_attention(..., attn_mask=mask)``.

    Everything else raises `NotImplementedError`: models add masks of numbers (0 visible, the lowest number hidden) to
    their scores, compare them with 0, or lengthen them by zeros, and a bool has the opposite or no meaning there. In a
    patched model it gets the mask that the model had before.

    Args:
        visible: what the mask shows. A matrix is bool and broadcastable to `shape`.
        shape: of the matrix that the model sees.
        omitted: transformers' "eager" has None here, as nothing is hidden, so that a model may use it for other sizes.
        before: the dtype of the masks that the model had before it was patched; None: it is not patched.
    """

    dtype = torch.bool
    requires_grad = False

    def __init__(
        self,
        visible: Visible,
        shape: tuple[int, ...],
        device: torch.device | str,
        omitted: bool = False,
        before: torch.dtype | None = None,
    ) -> None:
        self.visible = visible
        self.omitted = omitted
        self.before = before
        self.shape = torch.Size(shape)
        self.device = torch.device(device)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the mask on another device; the dtype stays bool.

        Raises:
            NotImplementedError: numbers are to become bools, where the hidden keys would be True.
        """
        device = None
        for x in (*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")):
            if x is torch.bool:
                if self.before is None:
                    raise _refusal("to(torch.bool)")
                return self.as_before().to(*args, **kwargs)
            if isinstance(x, Tensor):
                device = x.device
            elif isinstance(x, str | int | torch.device) and not isinstance(x, bool):
                device = torch.device(x)
        if device is None or device == self.device:
            return self
        if self.visible is None:
            return ModelMask(None, self.shape, device, self.omitted, self.before)
        visible = self.visible.to(device, non_blocking=kwargs.get("non_blocking", False))
        return ModelMask(visible, self.shape, device, before=self.before)

    def type_as(self, other: Tensor | ModelMask) -> ModelMask:
        """Returns itself: the dtype stays bool."""
        return self

    def contiguous(self, *args: Any, **kwargs: Any) -> ModelMask:
        """Returns itself, as do the methods that copy: the mask is never written to."""
        return self

    clone = detach = contiguous

    def dense(self) -> Tensor:
        """Returns the matrix, bool, of the mask's shape."""
        count_conversion("the model changes the mask itself")
        if self.visible is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        matrix = self.visible.to_dense(self.shape[-1]) if isinstance(self.visible, SpanMask) else self.visible
        return matrix.expand(self.shape)

    def as_before(self) -> Tensor:
        """Returns the matrix that the model had before it was patched: bool, or numbers to add to the scores."""
        matrix = self.dense()
        if self.before is None or self.before == torch.bool:
            return matrix
        lowest = torch.finfo(self.before).min
        return torch.zeros(matrix.shape, dtype=self.before, device=matrix.device).masked_fill(~matrix, lowest)

    def __getattr__(self, name: str) -> Any:
        if name in _MOVES or name in _BOOL_ALONE or name in _BOOL_ARGUMENT:
            function = getattr(Tensor, name)
            return lambda *args, **kwargs: _apply(name, function, (self, *args), kwargs)
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if self.before is None or name.endswith("_"):
            raise _refusal(name)
        return getattr(self.as_before(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(_name_of(function).strip("_"), function, args, kwargs or {})


def _name_of(function: Callable[..., Any]) -> str:
    """Returns an operator's name; in a graph "" for one that is none of `_NAMES`, where it is no method of a mask."""
    if function in _NAMES:
        return _NAMES[function]
    return "" if torch.compiler.is_compiling() else function.__name__


def _apply(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls an operator with the matrices of its masks.

    Raises:
        NotImplementedError: the operator may read a bool as a number, and the model is not patched; or it would write
            to the mask.
    """
    masks = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, ModelMask)]
    before = next((mask.before for mask in masks if mask.before is not None), None)
    try:
        _check(name, args, kwargs)
    except NotImplementedError:
        if before is None or _writes(function):
            raise
        args, kwargs = torch.utils._pytree.tree_map_only(ModelMask, ModelMask.as_before, (args, kwargs))
        return function(*args, **kwargs)
    args, kwargs = torch.utils._pytree.tree_map_only(ModelMask, ModelMask.dense, (args, kwargs))
    result = function(*args, **kwargs)
    if name not in _MOVES:
        return result
    again = lambda x: ModelMask(x, x.shape, x.device, before=before)
    return torch.utils._pytree.tree_map_only(Tensor, again, result)


def _writes(function: Callable[..., Any]) -> bool:
    """Returns whether an operator changes its first argument."""
    name = _name_of(function)
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError if an operator may read a bool as a number."""
    if name in _MOVES:
        _check_only_masks(name, args, kwargs)
    elif name in _BOOL_ARGUMENT:
        place, keyword = _BOOL_ARGUMENT[name]
        others = [x for number, x in enumerate(args) if number != place]
        others += [x for key, x in kwargs.items() if key != keyword]
        if any(isinstance(x, ModelMask) for x in others):
            raise _refusal(name)
    elif name not in _BOOL_ALONE:
        raise _refusal(name)


def _check_only_masks(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses to join a mask with a matrix of the model: its bools may be numbers, of which 0 means visible."""
    joined = args[0] if args else kwargs.get("tensors")
    if isinstance(joined, list | tuple) and not all(isinstance(x, ModelMask) for x in joined):
        raise _refusal(f"{name} with a matrix of its own")
    if isinstance(joined, Tensor):  # such as scores[mask]
        raise _refusal(name)


def _refusal(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'attn_implementation="mmkernels" is not for this model: it changes or applies the attention mask itself '
        f"({what}), and only the attention function of mmkernels can read that mask; {USE_ANOTHER}"
    )


def _method(operator: str) -> Callable[..., Any]:
    """Returns a method of Python's syntax; `__getattr__` is not asked for these."""

    def method(mask: ModelMask, *others: Any) -> Any:
        return _apply(operator.strip("_"), getattr(Tensor, operator), (mask, *others), {})

    return method


for _operator in (
    *("__getitem__", "__and__", "__rand__", "__or__", "__ror__", "__invert__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__xor__", "__rxor__", "__bool__", "__setitem__"),
    *("__float__", "__int__", "__matmul__", "__rmatmul__", "__pow__", "__rpow__", "__mod__", "__floordiv__"),
):
    setattr(ModelMask, _operator, _method(_operator))
ModelMask.__hash__ = object.__hash__  # type: ignore[method-assign]
