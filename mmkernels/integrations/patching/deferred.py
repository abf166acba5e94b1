"""Logits of an output layer that are never computed where only their loss is wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.integrations.patching import deferred_losses, deferred_rows
from mmkernels.integrations.patching.deferred_tensor import DeferredLogits, Source, version_of
from mmkernels.runtime.checks import DTYPES, PLAIN, autocast_dtype

__all__ = ["LEAST_LOGITS", "DeferredLogits", "can_defer", "defer", "is_worthwhile"]

LEAST_LOGITS = 2**20
"""Fewer than these are computed at once, which is faster: measured with one thread, V from 1,000 to 32,000."""

_LOADED = deferred_losses, deferred_rows  # their functions are in `deferred_tensor.HANDLERS`


def can_defer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether `defer` takes a linear layer's input and parameters.

    It does not where a graph is traced, a transform of ``torch.func`` or a mode is active, in forward mode, or where a
    tensor is of a class of its own, such as a quantised or distributed one.
    """
    if torch.compiler.is_compiling() or _is_watched():
        return False
    for x in (hidden, weight) if bias is None else (hidden, weight, bias):
        if type(x) not in PLAIN or x.dtype not in DTYPES or x.device != weight.device or x.is_meta:
            return False
    same = hidden.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    fits = weight.dim() == 2 and hidden.dim() >= 2 and 0 < hidden.shape[-1] == weight.shape[1] and weight.shape[0] > 0
    return fits and (same or autocast_dtype(hidden) is not None)


def is_worthwhile(rows: int, tokens: int) -> bool:
    """Returns whether so many logits are better not computed at once."""
    return rows * tokens >= LEAST_LOGITS


def defer(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredLogits:
    """Returns ``F.linear(hidden, weight, bias)``, not computed: see `DeferredLogits`.

    Args:
        hidden: ``[..., d]``; `can_defer` says whether it may be.
        weight: ``[V, d]``.
        bias: ``[V]`` or None.

    Example:
        >>> import torch
        >>> from mmkernels.integrations.patching.deferred import defer
        >>> hidden, weight = torch.randn(2, 6, 64), torch.randn(1000, 64)
        >>> logits = defer(hidden, weight)
        >>> loss = torch.nn.functional.cross_entropy(logits.view(-1, 1000), torch.randint(1000, (12,)))  # no logits
        >>> logits[0, 0, :3].shape  # those of one row
        torch.Size([3])
    """
    autocast = autocast_dtype(hidden)
    narrow = autocast is not None and hidden.dtype != torch.float64
    source = Source(
        hidden=hidden,
        weight=weight,
        bias=bias,
        steps=(),
        order=None,
        dtype=autocast if narrow and autocast is not None else hidden.dtype,
        autocast=autocast if narrow else None,
        recording=torch.is_grad_enabled(),
        versions=(version_of(hidden), version_of(weight), version_of(bias)),
    )
    return DeferredLogits.of(source)


def _is_watched() -> bool:
    """Returns whether a tracer, a transform or a mode must see every operator."""
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
