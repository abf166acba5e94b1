"""What ops compute of deferred logits without storing them: losses, log-probabilities, entropies, best tokens."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.integrations.patching.deferred_rows import stepped
from mmkernels.integrations.patching.deferred_steps import Form, Step, form_of
from mmkernels.integrations.patching.deferred_tensor import READ, DeferredLogits, Source, handles, is_pending
from mmkernels.ops.linear.inputs import Names, checked_head
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy
from mmkernels.ops.linear.linear_logprobs import results
from mmkernels.ops.linear.linear_logprobs.spec import Arguments, Results
from mmkernels.runtime.checks import can_look

_FUNCTIONS = {
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(1, dtype=torch.int64, device=x.device)),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "softmax": lambda x: torch.softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "exp": torch.exp,
    "sum": lambda x: torch.sum(x, -1),
}


# Losses


@handles(F.cross_entropy)
def _cross_entropy(
    func: Any,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if size_average is not None or reduce is not None:
        return READ
    return _loss(input, target, ("logits",), weight, ignore_index, reduction, label_smoothing)


@handles(F.nll_loss)
def _nll_loss(
    func: Any,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if size_average is not None or reduce is not None:
        return READ
    return _loss(input, target, ("log_softmax",), weight, ignore_index, reduction, 0.0)


def _loss(
    input: Any,
    target: Any,
    kinds: tuple[str, ...],
    weight: Any,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Any:
    form = _form(input, kinds)
    if form is None or not _are_tokens(target, input):
        return READ
    source = _classes_last(input)
    if source is None or tuple(target.shape) != tuple(source.hidden.shape[:-1]):
        return READ
    if isinstance(weight, DeferredLogits) or reduction not in ("mean", "sum", "none"):
        return READ
    with _as_called(source):
        hidden, rows, bias = _operands(source, form)
        loss = linear_cross_entropy(
            hidden,
            rows,
            target,
            linear_bias=bias,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=form.cap or None,
        )
    return loss.to(_dtype_of("cross_entropy", input))


def _classes_last(x: DeferredLogits) -> Source | None:
    """Returns logits whose classes are in dim 1, or in the last of one or two, with the classes last."""
    source, last = x.source, x.dim() - 1
    if source.order is None:
        return source if last <= 1 else None
    if last < 2 or source.order[1] != last:
        return None
    lead = [dim for dim in source.order if dim != last]
    return source._replace(hidden=source.hidden.permute(*lead, last), order=None)


# Log-probabilities


@handles(torch.log_softmax, Tensor.log_softmax, F.log_softmax)
def _log_softmax(func: Any, x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _normalised("log_softmax", x, dim, *args, **kwargs)


@handles(torch.softmax, Tensor.softmax, F.softmax)
def _softmax(func: Any, x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _normalised("softmax", x, dim, *args, **kwargs)


def _normalised(kind: str, x: Any, dim: Any = None, *args: Any, _stacklevel: int = 3, dtype: Any = None) -> Any:
    dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), dtype)
    if not is_pending(x) or x.source.order is not None or not _is_last(dim, x):
        return READ
    dtype = dtype or _dtype_of(kind, x)
    return stepped(x, Step(kind, dtype), dtype)


@handles(torch.exp, Tensor.exp)
def _exp(func: Any, x: Any, **kwargs: Any) -> Any:
    if kwargs or _form(x, ("log_softmax",)) is None:
        return READ
    return stepped(x, Step("exp"), _dtype_of("exp", x))


@handles(torch.gather, Tensor.gather)
def _gather(func: Any, x: Any, dim: Any, index: Any, *, sparse_grad: bool = False) -> Any:
    form = _form(x, ("logits", "log_softmax"))
    if form is None or sparse_grad or not _is_last(dim, x) or not _are_tokens(index, x):
        return READ
    if x.source.order is not None or tuple(index.shape) != (*x.shape[:-1], 1):
        return READ
    found = _of_rows(x, form, index.squeeze(-1))
    if form.kind == "log_softmax":
        return found.logprobs.reshape(index.shape).to(x.dtype)
    x.lse = found.lse.reshape(x.shape[:-1])
    return (found.logprobs + found.lse).reshape(index.shape).to(x.dtype)


@handles(torch.logsumexp, Tensor.logsumexp)
def _logsumexp(func: Any, x: Any, dim: Any, keepdim: bool = False) -> Any:
    form = _form(x, ("logits",))
    if form is None or not _is_last(dim, x) or x.source.order is not None:
        return READ
    lse = x.lse
    if lse is None and x.parent is not None and x.parent.lse is not None and x.of_rows:
        lse = x.seen_as(x.parent.lse)
    if lse is None or (torch.is_grad_enabled() and x.source.recording and not lse.requires_grad):
        lse = _of_rows(x, form).lse.reshape(x.shape[:-1])
    return (lse.unsqueeze(-1) if keepdim else lse).to(_dtype_of("logsumexp", x))


# Statistics


@handles(torch.sum, Tensor.sum)
def _sum(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    form = _form(x, ("times_log",))
    if form is None or not _is_last(dim, x):
        return READ
    total = -_of_rows(x, form, entropy=True).entropy_of_rows.reshape(x.shape[:-1])
    return (total.unsqueeze(-1) if keepdim else total).to(dtype or _dtype_of("sum", x))


@handles(torch.mean, Tensor.mean)
def _mean(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    form = _form(x, ("logits",))
    if form is None or form.cap or not _is_last(dim, x) or x.source.order is not None or x.source.autocast:
        return READ
    with _as_called(x.source):
        hidden, weight, bias = _operands(x.source, form)
        wide = torch.promote_types(torch.float32, x.dtype)
        mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
        mean = mean if bias is None else mean + bias.mean(dtype=wide)
    return (mean.unsqueeze(-1) if keepdim else mean).to(dtype or x.dtype)


@handles(torch.argmax, Tensor.argmax)
def _argmax(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    form = _form(x, ("logits", "log_softmax", "softmax"))
    if form is None or not _is_last(dim, x) or x.source.order is not None:
        return READ
    with torch.no_grad():
        best = _of_rows(x, form, best=True).best_index.reshape(x.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best


# Their arguments


def _form(x: Any, kinds: tuple[str, ...]) -> Form | None:
    """Returns the form of deferred logits of these kinds; None: x must be read."""
    if not is_pending(x) or not x.shape[-1] or x.is_meta:
        return None
    form = form_of(x.source.bias, x.source.steps)
    return None if form is None or form.kind not in kinds else form


def _is_last(dim: Any, x: Tensor) -> bool:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, x.dim() - 1)


def _are_tokens(index: Any, x: Tensor) -> bool:
    plain = isinstance(index, Tensor) and not isinstance(index, DeferredLogits)
    return plain and index.dtype == torch.int64 and index.device == x.device and (index.is_cuda or can_look(index))


def _as_called(source: Source) -> Any:
    """Returns the context in which an op reads a source's tensors as the linear layer would have."""
    source.check()
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and source.recording))
    stack.enter_context(source.autocasting())
    return stack


def _operands(source: Source, form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns hidden, weight and bias whose logits are a form's, but for its cap."""
    hidden, bias = source.hidden, form.bias
    if isinstance(form.scale, Tensor) or form.scale != 1.0:
        hidden = (hidden * form.scale).to(hidden.dtype)
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        bias = bias.to(torch.float32)
    return hidden, source.weight, bias


def _of_rows(
    x: DeferredLogits, form: Form, target: Tensor | None = None, entropy: bool = False, best: bool = False
) -> Results:
    """Returns what `linear_logprobs` computes of each row.

    Args:
        target: int64 ``[...]``; None: of no interest.
    """
    source = x.source
    with _as_called(source):
        head = checked_head(*_operands(source, form), Names())
        rows = head.hidden.shape[0]
        if target is None:
            target = torch.zeros(rows, dtype=torch.int64, device=head.hidden.device)
        args = Arguments(
            *head,
            target=_checked(target.reshape(-1), head.weight.shape[0]),
            token_weight=None,
            softcap=form.cap,
            temperature=1.0,
            entropy=entropy,
            average=False,
            best=best,
            group="",
        )
        return results(args, None)


def _checked(index: Tensor, vocabulary: int) -> Tensor:
    """Returns the tokens; raises as ``torch.gather`` does, where that needs no look at a device."""
    if index.is_cpu and index.numel():
        low, high = (int(n) for n in index.aminmax())
        if low < 0 or high >= vocabulary:
            raise RuntimeError(f"index must be of tokens, from 0 to {vocabulary - 1}, got {low if low < 0 else high}")
    return index


def _dtype_of(name: str, x: DeferredLogits) -> torch.dtype:
    """Returns the dtype of a function of logits, as autocast has it now."""
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return x.dtype if autocast is None else _dtype_under_autocast(name, x.dtype, device, autocast)


@lru_cache(maxsize=256)
def _dtype_under_autocast(name: str, dtype: torch.dtype, device: torch.device, autocast: torch.dtype) -> torch.dtype:
    with torch.no_grad():
        return _FUNCTIONS[name](torch.zeros(1, 2, dtype=dtype, device=device)).dtype
