"""The cross-entropy of a linear head, without the logits' matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.kept import scaled
from mmkernels.ops.linear.formula import IGNORED, best_index, logits_of
from mmkernels.ops.linear.inputs import Head, Names, checked_cap, checked_head, checked_target, told
from mmkernels.ops.linear.linear_cross_entropy import chunked
from mmkernels.ops.linear.linear_cross_entropy.spec import (
    KEEP,
    KEPT,
    SQUARE,
    Arguments,
    Results,
    fake,
    formula,
    reference,
    row_losses,
)
from mmkernels.ops.linear.linear_logprobs import parallel, results
from mmkernels.ops.linear.linear_logprobs.spec import Arguments as RowArguments
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import check_floating, check_number, in_graph, is_known, requires_grad
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.eager import cotangents_are_batched, transform_active
from mmkernels.runtime.gradient import Gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_cross_entropy"]

_NAMES = Names("input", "linear_weight", "linear_bias")
_REDUCTIONS = ("mean", "sum", "none")


class CrossEntropy(NamedTuple):
    """What `cross_entropy` returns; logprobs and best_index are not differentiable."""

    loss: Tensor  # wide, without a dim, or [...] without a reduction
    z_loss: Tensor  # the part of the loss that is the z-loss; without a reduction differentiable
    logprobs: Tensor  # wide [...], the targets', 0 where ignored; of no use with probabilities
    best_index: Tensor  # int64 [...], -1 where ignored; [0] unless it is wanted


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)``, without the logits in memory.

    The arguments are those of ``torch.nn.functional.linear_cross_entropy``, and two that language models use. With
    ``reduction="mean"`` or ``"sum"`` the gradients that autograd will ask for are computed with the loss, from the same
    logits: three matrix products a training step, two for a frozen weight, and one accumulator of the weight's size in
    float32. Without a reduction, and over a group, the backward pass computes the logits again: four products, and no
    accumulator; see `linear_logprobs`.

    Args:
        input: ``[..., d]``, float16, bfloat16, float32 or float64.
        linear_weight: ``[V, d]``, input's dtype and device; strided as it likes.
        target: int64 ``[...]``, the right token of each row, or `ignore_index`: such a row is not multiplied, and
            nothing of it reaches a result. Values are checked on a CPU; on a GPU, where that would wait for the device,
            a target that is no token makes the loss NaN. Or class probabilities ``[..., V]`` in a floating dtype,
            without a gradient: they run on "chunked", and without a reduction by the naive formula.
        linear_bias: ``[V]``, input's dtype or float32; -inf hides a token.
        weight: of each class, ``[V]``, real: over a group ``[the tokens of all ranks]``. It gets no gradient.
        ignore_index: a target that marks ignored rows. Not used for probabilities.
        label_smoothing: from 0 to 1, the share of each target that is spread evenly over all tokens.
        reduction: "mean" (over rows that are not ignored, weighted by their targets' class weights, as in PyTorch),
            "sum" or "none".
        softcap: a positive number, or None: logits z are not capped to ``softcap tanh(z / softcap)`` (Gemma 2).
        z_loss: a number, at least 0, by which ``lse^2`` of each row that is not ignored is multiplied and added (PaLM);
            "mean" divides it by the number of those rows.
        group: ranks that hold the vocabulary's tokens together, as in `linear_logprobs`, or None.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too) or "reference", the naive formula, differentiated by PyTorch's
            own autograd outside ``torch.compile``.

    Returns:
        a float32 tensor (float64 for float64 inputs) without a dim, or ``[...]`` with ``reduction="none"``, 0 where
        ignored. Where all rows are ignored, or there is none, the mean is NaN, as in PyTorch, and the gradients are 0.
        Differentiable by input, linear_weight and linear_bias; second derivatives, and those in forward mode, are
        computed by the reference formula, at its memory cost.

    Under autocast input and linear_weight are cast to the autocast dtype; the loss stays float32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, target or number. Each names the argument,
            what it must be and what it got. Over a group also where ranks differ in what must be the same.
        BackendError: a forced backend can't run this call.
        GroupError: (a RuntimeError) a rank has died, is late, or called something else.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; gradients with the loss as in
    Hsu et al., "Liger Kernel", 2024, section 3.2. z-loss: Chowdhery et al., "PaLM", 2022, section 5.

    Example:
        >>> import torch, mmkernels
        >>> hidden = torch.randn(6, 64, requires_grad=True)
        >>> head = torch.nn.Parameter(torch.randn(1000, 64))
        >>> target = torch.tensor([-100, -100, 17, 5, 999, 2])  # two rows of the prompt
        >>> loss = mmkernels.linear_cross_entropy(hidden, head, target)
        >>> loss.backward()
        >>> bool((hidden.grad[:2] == 0).all())
        True
    """
    return cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        softcap=softcap,
        z_loss=z_loss,
        group=group,
        backend=backend,
    ).loss


def cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
    z_loss: float,
    group: ProcessGroup | None,
    backend: str | None,
    return_best: bool = False,
) -> CrossEntropy:
    """Returns what `linear_cross_entropy` does, and beside it what modules report of the same logits.

    Args:
        return_best: whether to return the tokens with the largest logits.
    """

    def make(name: str) -> _Call:
        if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        least = 0 if name else 1
        head = checked_head(input, linear_weight, linear_bias, _NAMES, least)
        probabilities = _probabilities(target, input, linear_weight, name)
        if probabilities is None:
            vocabulary = None if name else linear_weight.shape[0]
            rows = checked_target(target, input, ignore_index, _NAMES, vocabulary)
        else:
            rows = torch.zeros(head.hidden.shape[0], dtype=torch.int64, device=target.device)
        return _Call(
            head,
            rows,
            probabilities,
            class_weight=_class_weight(weight, head, group=bool(name)),
            smoothing=check_number("label_smoothing", label_smoothing, "a number from 0 to 1", 0.0, 1.0),
            reduction=reduction,
            softcap=checked_cap(softcap),
            z_loss=check_number("z_loss", z_loss, "a number, at least 0", 0.0),
            best=return_best,
            group=name,
        )

    call = told(make, group, parallel.CALL, input)
    shape = target.shape if call.probabilities is None else target.shape[:-1]
    if call.reduction == "none" or call.group or is_known(call.head.hidden.shape[0] == 0):
        return _of_rows(call, backend, shape)
    return _reduced(call, backend, shape)


class _Call(NamedTuple):
    """Checked arguments."""

    head: Head
    target: Tensor  # int64 [T], 0 where there are probabilities
    probabilities: Tensor | None  # [T, V]
    class_weight: Tensor | None  # wide [V]
    smoothing: float
    reduction: str
    softcap: float
    z_loss: float
    best: bool
    group: str

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    def token_weight(self) -> Tensor | None:
        """Returns what `formula.TOTAL` is summed with: the class weights, where the loss sums over all tokens."""
        if self.class_weight is not None and (self.smooths or self.probabilities is not None):
            return self.class_weight
        return self.head.hidden.new_ones(self.vocabulary, dtype=wide_dtype(self.head.hidden)) if self.smooths else None

    @property
    def smooths(self) -> bool:
        """Whether labels may be smoothed: a share that a graph computes is not looked at."""
        return isinstance(self.smoothing, torch.SymFloat) or self.smoothing != 0.0

    def weight_of_rows(self) -> Tensor:
        """Returns wide [T], the class weight of each row's target, 0 where it is ignored."""
        live, wide = self.target != IGNORED, wide_dtype(self.head.hidden)
        if self.class_weight is None or self.probabilities is not None:
            return live.to(wide)
        token = self.target.clamp(0, self.class_weight.shape[0] - 1)
        return self.class_weight[token].where(live, 0.0)

    def divisors(self, of_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns by what the cross-entropy and the z-loss are divided.

        Args:
            of_rows: see `weight_of_rows`.
        """
        if self.reduction != "mean":
            one = of_rows.new_ones(())
            return one, one
        count = (self.target != IGNORED).sum().to(of_rows.dtype)
        weighted = self.class_weight is not None and self.probabilities is None
        return (of_rows.sum() if weighted else count), count


def _class_weight(weight: object, head: Head, group: bool) -> Tensor | None:
    if weight is None:
        return None
    check_floating("weight", weight)
    assert isinstance(weight, Tensor)
    count = head.weight.shape[0]
    if weight.dim() != 1 or (not group and weight.shape[0] != count):
        raise ValueError(f"weight must be [{'V' if group else count}], one for each token, got {tuple(weight.shape)}")
    if not (weight.is_cpu and head.hidden.is_cpu) and weight.device != head.hidden.device:
        raise ValueError(f"weight must be on input's device {head.hidden.device}, got {weight.device}")
    return weight.detach().to(wide_dtype(head.hidden))


def _probabilities(target: Tensor, input: Tensor, linear_weight: Tensor, group: str) -> Tensor | None:
    """Returns class probabilities [T, V], or None: targets are tokens."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return None
    check_floating("target", target)
    must = (*input.shape[:-1], linear_weight.shape[0])
    if group:
        raise TypeError("target must be int64 over a group, where no rank has all tokens; got class probabilities")
    if tuple(target.shape) != must:
        raise ValueError(
            f"target must be int64 {list(must[:-1])}, or probabilities {list(must)}, got {tuple(target.shape)}"
        )
    if target.requires_grad:
        raise ValueError("target must not require a gradient: detach the probabilities")
    if not (target.is_cpu and input.is_cpu) and target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    return target.reshape(-1, must[-1])


def _arguments(call: _Call, of_rows: Tensor, divisor: Tensor, count: Tensor) -> Arguments:
    """Returns the op's record.

    Args:
        of_rows, divisor, count: see `_Call.weight_of_rows` and `_Call.divisors`.
    """
    live = call.target != IGNORED

    def part(values: Tensor | float, by: Tensor) -> Tensor:
        """0 in ignored rows, also where all rows are and `by` is 0."""
        return torch.where(live, values / by, 0.0)

    spread = call.smoothing / call.vocabulary
    parts = part((1.0 - call.smoothing) * of_rows, divisor), part(spread, divisor), part(call.z_loss, count)
    # `torch.jit.trace` traces once more without gradients, and demands the same graph.
    recording = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
    keep = [recording and x is not None and requires_grad(x) for x in call.head]
    return Arguments(
        *call.head,
        target=call.target,
        token_weight=call.token_weight(),
        probabilities=call.probabilities,
        rows=torch.stack(parts),
        softcap=call.softcap,
        best=call.best,
        keep_input=keep[0],
        keep_linear_weight=keep[1],
        keep_linear_bias=keep[2],
    )


def _reduced(call: _Call, backend: str | None, shape: torch.Size) -> CrossEntropy:
    """The loss and its gradients in one pass."""
    of_rows = call.weight_of_rows()
    divisor, count = call.divisors(of_rows)
    args, backend = _arguments(call, of_rows, divisor, count), resolve(backend)
    if call.probabilities is not None and backend != "reference":
        backend = "chunked"  # which alone reads them
    if backend == "reference" and not in_graph():
        with torch._C._DisableAutocast():  # the head has been cast
            found = Results._make((formula(args), *reference(args.without_gradients())[1:]))
    else:
        found = Results._make(OP(args, backend))
    loss = found.loss + torch.where(divisor == 0, torch.nan, 0.0)
    z_loss = (args.rows[SQUARE] * found.lse.detach() ** 2).sum()
    best = found.best_index.reshape(shape) if call.best else found.best_index
    return CrossEntropy(loss, z_loss, found.logprobs.detach().reshape(shape), best)


def _of_rows(call: _Call, backend: str | None, shape: torch.Size) -> CrossEntropy:
    """Each row's loss, from its log-probabilities, and their reduction."""
    of_rows = call.weight_of_rows()
    if call.probabilities is None:
        args = RowArguments(
            *call.head,
            target=call.target,
            token_weight=call.class_weight if call.smooths or call.group else None,  # a group checks how many they are
            softcap=call.softcap,
            temperature=1.0,
            entropy=False,
            average=call.smooths,
            best=call.best,
            group=call.group,
        )
        found = results(args, backend)
        logprobs, squares, best = found.logprobs, found.lse**2, found.best_index
        loss = -(1.0 - call.smoothing) * of_rows * logprobs
        if call.smooths:
            loss = loss - call.smoothing * found.average
    else:
        loss, squares, best = _of_probabilities(call, of_rows)
        logprobs = loss
    squares = call.z_loss * squares
    logprobs, best = logprobs.detach().reshape(shape), best.reshape(shape) if call.best else best
    if call.reduction == "none":
        total = loss + squares if call.z_loss else loss
        return CrossEntropy(total.reshape(shape), squares.reshape(shape), logprobs, best)
    divisor, count = call.divisors(of_rows)

    def mean(x: Tensor, by: Tensor) -> Tensor:
        """NaN where nothing is summed, with gradients of 0."""
        return x.sum() / by.where(by != 0, 1.0) + torch.where(by == 0, torch.nan, 0.0)

    total, z_loss = mean(loss, divisor), mean(squares, count)
    return CrossEntropy(total + z_loss if call.z_loss else total, z_loss.detach(), logprobs, best)


def _of_probabilities(call: _Call, of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each row's cross-entropy and squared log-sum-exp by the naive formula, and the best tokens."""
    one = of_rows.new_ones(())
    args = _arguments(call, of_rows, one, one)
    rows = args.rows.clone()
    rows[SQUARE] = 0.0
    device = call.head.hidden.device.type  # TorchDynamo does not know `_DisableAutocast`
    with torch.autocast(device, enabled=False) if in_graph() else torch._C._DisableAutocast():  # the head has been cast
        y = logits_of(args)
        loss, lse = row_losses(args._replace(rows=rows), y)
    return loss, lse**2, best_index(y.detach()) if call.best else call.target.new_empty(0)


def _scaled(args: Any) -> tuple[Tensor, ...]:
    """The backward pass: the loss's gradients times what flows back to it."""
    inputs, kept = (args.input, args.linear_weight, args.linear_bias), (getattr(args, name) for name in KEPT)
    needs = (args.need_input, args.need_linear_weight, args.need_linear_bias)
    found = (
        scaled(grad, args.grad_loss, x.dtype) if need and x is not None else args.input.new_empty(0)
        for x, grad, need in zip(inputs, kept, needs, strict=True)
    )
    return tuple(found)


def _passes(args: Any) -> Mapping[str, Tensor]:
    """Returns the kept gradients that are the wanted ones, as 1 flows back: no copy of the weight's size is made.

    None with ``retain_graph=True``: the caller may write into the gradients before the next backward pass.
    """
    flow = args.grad_loss
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return {}
    if not flow.is_cpu or torch.is_grad_enabled() or transform_active() or cotangents_are_batched() or float(flow) != 1:
        return {}
    names = ("input", "linear_weight", "linear_bias")
    pairs = ((name, getattr(args, name), getattr(args, f"of_{name}")) for name in names)
    return {name: grad for name, x, grad in pairs if x is not None and grad.shape == x.shape and grad.dtype == x.dtype}


OP = define(
    "linear_cross_entropy",
    Arguments,
    Results,
    fake=fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("linear_cross_entropy_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=KEPT,
        formula=lambda args: (formula(Arguments(*(getattr(args, name) for name in Arguments._fields))),),
        backends=[Backend("chunked", _scaled), Backend("reference", _scaled)],
        contiguous=True,
        prepared=KEEP,
        passes=_passes,
    ),
)
