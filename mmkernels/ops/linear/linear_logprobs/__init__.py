"""Log-probabilities of chosen tokens, and the entropy, without the logits' matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmkernels.ops.linear.formula import IGNORED
from mmkernels.ops.linear.inputs import (
    Names,
    checked_cap,
    checked_head,
    checked_target,
    checked_temperature,
    told,
)
from mmkernels.ops.linear.linear_logprobs import parallel
from mmkernels.ops.linear.linear_logprobs.spec import Arguments, Results
from mmkernels.runtime.checks import check_bool, in_graph
from mmkernels.runtime.dispatch import define, resolve
from mmkernels.runtime.gradient import Gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_logprobs"]

_NAMES = Names()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_correct: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``log softmax(y)[target]`` of each row, with the logits ``y = softcap tanh((hidden weight' + bias) / softcap) /
    temperature``, which are never stored: memory is linear in the inputs.

    One forward pass gives all results, from the same tile of logits. The backward pass computes the logits again: four
    matrix products a training step. Where only a mean or a sum of cross-entropies is wanted, `linear_cross_entropy`
    needs three.

    Args:
        hidden: ``[..., d]``, a decoder's last hidden states, float16, bfloat16, float32 or float64.
        weight: ``[V, d]``, the head's (often the embedding's) rows, hidden's dtype and device; strided as it likes.
        target: int64 ``[...]``, the chosen token of each row, or `ignore_index`: such a row is not multiplied, and
            nothing of it reaches a result. Values are checked on a CPU; on a GPU, where that would wait for the
            device, a target that is no token gets NaN, and no gradient.
        bias: ``[V]``, hidden's dtype or float32; -inf hides a token.
        softcap: a positive number, or None: the logits are not capped.
        temperature: a positive number by which the capped logits are divided.
        ignore_index: a target that marks ignored rows. It may also be a token's index.
        return_entropy: also return each row's ``-sum_c p_c log p_c``, in nats; ``0 log 0`` is 0.
        return_correct: also return whether the target has the largest logit, as token accuracy counts it: of equal
            ones the lowest index is the largest.
        group: ranks that each hold the same rows and some of the vocabulary's tokens, as many as they have, in the
            order of ranks, or None: this process alone. See below.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too) or "reference", the naive formula, differentiated by PyTorch's
            own autograd outside ``torch.compile``.

    Returns:
        ``[...]`` float32 (float64 for float64 inputs), 0 where ignored; with `return_entropy` or `return_correct` a
        tuple of it, the entropy, 0 where ignored, and a bool ``[...]``, False where ignored. The first two are
        differentiable by hidden, weight and bias; second derivatives, and those in forward mode, are computed by the
        reference formula, at its memory cost.

    Sums are made in float32 (float64), the weight's gradient too, and are the same each time. No gradient is computed
    for what needs none, a frozen weight for example. A row with NaN has NaN results. Under autocast hidden, weight and
    bias are cast to the autocast dtype.

    **Over a group** the vocabulary is spread over ranks (vocabulary-parallel, as in Megatron-LM): each passes all rows,
    the same on every rank, and its own rows of `weight` and `bias`; `target` counts all ranks' tokens. Every rank gets
    the same results. The gradient of hidden is summed over the ranks inside, so that it is complete on each; the loss
    counts once: nothing is to be divided by the number of ranks. No second derivatives.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, target or number. Each names the argument,
            what it must be and what it got. Over a group every rank raises ValueError where one rank's arguments are
            bad, or ranks differ in what must be the same.
        BackendError: a forced backend can't run this call.
        GroupError: (a RuntimeError) a rank has died, is late, or called something else.

    Source: the recomputed tiles of logits are those of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models", 2024, section 4; the spread vocabulary is that of Shoeybi et al., "Megatron-LM", 2019, section 3.

    Example:
        >>> import torch, mmkernels
        >>> hidden, weight = torch.randn(2, 6, 64), torch.randn(1000, 64)
        >>> target = torch.randint(1000, (2, 6))
        >>> target[:, :2] = -100  # the prompt
        >>> logprobs, entropy = mmkernels.linear_logprobs(hidden, weight, target, return_entropy=True)
        >>> logprobs.shape, bool((logprobs[:, :2] == 0).all())
        (torch.Size([2, 6]), True)
    """

    def make(name: str) -> Arguments:
        check_bool("return_entropy", return_entropy)
        check_bool("return_correct", return_correct)
        head = checked_head(hidden, weight, bias, _NAMES, least=0 if name else 1)
        return Arguments(
            *head,
            target=checked_target(target, hidden, ignore_index, _NAMES, None if name else weight.shape[0]),
            token_weight=None,
            softcap=checked_cap(softcap),
            temperature=checked_temperature(temperature),
            entropy=return_entropy,
            average=False,
            best=return_correct,
            group=name,
        )

    args = told(make, group, parallel.CALL, hidden)
    found, shape = results(args, backend), target.shape
    wanted = [found.logprobs.reshape(shape)]
    if return_entropy:
        wanted.append(found.entropy_of_rows.reshape(shape))
    if return_correct:
        wanted.append(((found.best_index == args.target) & (args.target != IGNORED)).reshape(shape))
    return tuple(wanted) if len(wanted) > 1 else wanted[0]


def results(args: Arguments, backend: str | None) -> Results:
    """Returns the op's results, differentiated by PyTorch itself where the reference is forced."""
    backend = resolve(backend)
    if backend == "reference" and not args.group and not in_graph():
        with torch._C._DisableAutocast():  # the head has been cast
            return Results._make(parallel.reference(args))
    return Results._make(OP(args, backend))


OP = define(
    "linear_logprobs",
    Arguments,
    Results,
    fake=parallel.fake,
    backends=parallel.FORWARD,
    gradient=Gradient(
        saves=("entropy_of_rows", "softmax"),
        formula=parallel.formula_of_pass,
        backends=parallel.BACKWARD,
        contiguous=True,
    ),
)
