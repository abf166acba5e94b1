"""How a head is checked whose logits do not fit into memory.

Rows depend on each other only through the gradient of the weight. So a sample of rows, each with all tokens, is
computed by the definition. The softmax of every row is computed once more in float64, block by block of tokens; with it
the gradients of a sample of tokens are computed, each from all rows. The sum of all rows' gradients times their hidden
states is known too, and that of all tokens' gradients times their weights is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.spec import Expected, Inputs, Parts, flatten

_SAMPLE = 128  # rows, and tokens, whose results are compared, the first and the last among them
_BLOCK = 8192  # tokens whose logits with all rows are computed at once
_IGNORED = -100

_NAMES = (("hidden", "weight"), ("input", "linear_weight"))  # of a head's tensors, by op
_PLAIN = {"target", "return_entropy"}.union(*_NAMES)


class _Head(NamedTuple):
    """A problem's tensors."""

    hidden: Tensor  # [T, d], 0 in ignored rows
    weight: Tensor  # [V, d]
    target: Tensor  # int64 [T]
    live: Tensor  # bool [T]


class _Rows(NamedTuple):
    """What the logits of each row are, wide [T]."""

    lse: Tensor
    mean: Tensor  # of the logits, by their softmax
    variance: Tensor
    picked: Tensor  # the target's logit

    @property
    def logprobs(self) -> Tensor:
        return self.picked - self.lse

    @property
    def entropy(self) -> Tensor:
        return self.lse - self.mean


class _Flows(NamedTuple):
    """What flows back to each row's log-probability and entropy, float64 [T]."""

    logprobs: Tensor
    entropy: Tensor


def elements(inputs: Inputs) -> int:
    """Returns the number of elements of the logits."""
    _, weight = _tensors(inputs)
    return inputs["target"].numel() * len(weight)


def logprobs_expected(inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> list[Expected]:
    """Returns what is right for a call of `linear_logprobs` with or without the entropy."""
    head = _head(inputs)
    truth = _rows(head, torch.float64)
    outputs = [truth.logprobs, truth.entropy][: 2 if inputs.get("return_entropy") else 1]
    flows = [x.double() for x in cotangents] + [torch.zeros_like(truth.lse)] * (2 - len(cotangents))
    return _expected(head, truth, [x.where(head.live, 0.0) for x in outputs], _Flows(*flows), grads)


def cross_entropy_expected(inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> list[Expected]:
    """Returns what is right for a call of `linear_cross_entropy` with reduction="mean"."""
    head = _head(inputs)
    truth, share = _rows(head, torch.float64), head.live.double() / head.live.sum()
    loss = -(truth.logprobs * share).sum()
    flow = cotangents[0].double() if cotangents else torch.zeros_like(loss)
    return _expected(head, truth, [loss], _Flows(-flow * share, torch.zeros_like(share)), grads)


def _tensors(inputs: Inputs) -> tuple[Tensor, Tensor]:
    hidden, weight = next(names for names in _NAMES if names[0] in inputs)
    return inputs[hidden].detach(), inputs[weight].detach()


def _head(inputs: Inputs) -> _Head:
    hidden, weight = _tensors(inputs)
    if inputs.keys() - _PLAIN or hidden.dim() != 2:
        raise NotImplementedError(f"only plain rows [T, d] are checked in parts, got {', '.join(inputs)}")
    target, live = inputs["target"], inputs["target"] != _IGNORED
    return _Head(hidden.masked_fill(~live[:, None], 0.0), weight, target, live)


def _rows(head: _Head, dtype: torch.dtype) -> _Rows:
    """Returns what logits in `dtype` are; all but the products is wide."""
    hidden, wide = head.hidden.to(dtype), _wide(dtype)
    last = hidden.new_full((len(hidden),), -torch.inf, dtype=wide)
    sums = hidden.new_zeros((3, len(hidden)), dtype=wide)
    for tokens in head.weight.split(_BLOCK):
        y = (hidden @ tokens.to(dtype).T).to(wide)
        base = torch.maximum(last, y.amax(1))
        powers = (y - base[:, None]).exp_()
        of_block = [powers.sum(1), powers.mul_(y).sum(1), powers.mul_(y).sum(1)]
        sums = sums * (last - base).exp() + torch.stack(of_block)
        last = base
    mean, square = sums[1:] / sums[0]
    chosen = head.weight[head.target.clamp(min=0)].to(dtype)
    picked = (hidden[:, None] @ chosen[:, :, None])[:, 0, 0].to(wide)
    return _Rows(last + sums[0].log(), mean, square - mean**2, picked)


def _expected(head: _Head, truth: _Rows, outputs: list[Tensor], flows: _Flows, grads: Sequence[str]) -> list[Expected]:
    """Returns what is right in a sample of rows and tokens, and for sums over all of them.

    The sampled gradients are multiplied by powers of 2 so that each is about as large as 1: an error in one row then
    counts as much as in any other. The sums are divided by that of their terms' sizes.

    Args:
        outputs: in float64, of all rows, or their sum.
    """
    count, dtype = len(outputs), head.hidden.dtype
    half, supervised = _SAMPLE // 2, head.live.nonzero()[:, 0]
    rows = _some(len(head.hidden), supervised[torch.randperm(len(supervised), generator=_generator())[:half]])
    tokens = _some(len(head.weight), head.target[supervised[:half]])
    chosen = {count + place: (rows if name in ("hidden", "input") else tokens) for place, name in enumerate(grads)}
    chosen |= {place: rows for place, x in enumerate(outputs) if x.dim()}

    def definition(dtype: torch.dtype) -> list[Tensor]:
        found, of_hidden = _of_rows(head, rows, count, flows, dtype)
        results = found if outputs[0].dim() else [_rounded(x, head, dtype) for x in outputs]
        if any(chosen[count + place] is tokens for place in range(len(grads))):
            of_tokens = _of_tokens(head, truth if dtype == torch.float64 else _rows(head, dtype), tokens, flows, dtype)
        return results + [of_hidden if chosen[count + place] is rows else of_tokens for place in range(len(grads))]

    naive, true = definition(dtype), definition(torch.float64)
    scales = [_scale(x) for x in true[count:]]

    def scaled(place: int, x: Tensor) -> Tensor:
        return (x.double() * scales[place - count]).to(x.dtype) if place >= count else x

    def of_sample(place: int, x: Tensor) -> Tensor:
        return scaled(place, x[chosen[place]]) if place in chosen else x

    total, size = _sum_of_all(head, truth, flows)

    def of_all(place: int, x: Tensor) -> Tensor:
        if place < count:
            return x.double().mean()
        return _dot(x, head.hidden if chosen[place] is rows else head.weight) / size

    def sums(dtype: torch.dtype) -> list[Tensor]:
        means = [_rounded(x.mean(), head, dtype) for x in outputs]
        return means + [(total / size + _error(head, dtype)).to(_wide(dtype))] * len(grads)

    samples = [[scaled(place, x) for place, x in enumerate(results)] for results in (naive, true)]
    return [Expected(of_sample, *samples), Expected(of_all, sums(dtype), sums(torch.float64))]


def _of_rows(head: _Head, rows: Tensor, outputs: int, flows: _Flows, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Returns the log-probabilities and entropies of some rows by the definition, and the gradient of hidden."""
    from mmkernels.ops.linear.linear_logprobs import linear_logprobs  # which imports this module

    hidden = head.hidden[rows].to(dtype).requires_grad_()
    with torch.enable_grad():
        found = flatten(
            linear_logprobs(hidden, head.weight.to(dtype), head.target[rows], return_entropy=True, backend="reference")
        )
        (grad,) = torch.autograd.grad(found, hidden, [flow[rows].to(x) for flow, x in zip(flows, found, strict=True)])
    return [x.detach() for x in found[:outputs]], grad


def _of_tokens(head: _Head, of_rows: _Rows, tokens: Tensor, flows: _Flows, dtype: torch.dtype) -> Tensor:
    """Returns the gradients of some tokens' weights; all but the products is wide."""
    hidden = head.hidden.to(dtype)
    z = hidden @ head.weight[tokens].to(dtype).T  # [T, sample]
    columns = (of_rows.lse, of_rows.entropy, *flows)
    lse, entropy, logprob, flow = (x.to(_wide(dtype))[:, None] for x in columns)
    logp = z.to(lse.dtype) - lse
    slope = logp.exp() * -(logprob + flow * (entropy + logp))
    slope += torch.where(head.target[:, None] == tokens, logprob, 0.0)
    return slope.where(head.live[:, None], 0.0).to(dtype).T @ hidden


def _sum_of_all(head: _Head, of_rows: _Rows, flows: _Flows) -> tuple[Tensor, Tensor]:
    """Returns the sum over all logits of each times its gradient, and the sum of the sizes of the terms.

    By the softmax, of a log-probability's gradient it is the target's logit less the mean, and of the entropy's minus
    the variance.
    """
    logprob, entropy = (flow.where(head.live, 0.0) for flow in flows)
    mean, variance, picked = of_rows.mean, of_rows.variance, of_rows.picked
    total = (logprob * (picked - mean) - entropy * variance).sum()
    sizes = logprob.abs() * (picked.abs() + mean.abs()) + entropy.abs() * (variance + mean.abs())
    return total, sizes.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _rounded(x: Tensor, head: _Head, dtype: torch.dtype) -> Tensor:
    """Returns a sum over all rows in the wide dtype. The naive formula's is at best rounded to the inputs' dtype."""
    return (x * (1 + _error(head, dtype))).to(_wide(dtype))


def _error(head: _Head, dtype: torch.dtype) -> float:
    """Returns the relative error of a number that is rounded to the inputs' dtype; of the truth it is 0."""
    return 0.0 if dtype == torch.float64 else torch.finfo(head.hidden.dtype).eps / 2


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _some(count: int, more: Tensor) -> Tensor:
    """Returns some of `count` numbers, the same each time, the first, the last and `more` among them."""
    drawn = torch.randperm(count, generator=_generator())[: _SAMPLE // 2]
    return torch.cat([drawn.to(more), torch.tensor([0, count - 1]).to(more), more]).unique()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _scale(x: Tensor) -> Tensor:
    """Returns for each row of x [rows, d] the power of 2, [rows, 1], that makes it about 1; 1 for a row of zeros."""
    size = x.square().mean(1, keepdim=True).sqrt()
    return torch.where(size > 0, size.log2().round().neg().exp2(), 1.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Returns the sum of the elements' products, in float64."""
    parts = zip(x.split(256), y.split(256), strict=True)  # in the caches
    return torch.stack([(a.double() * b.double()).sum() for a, b in parts]).sum()


LOGPROBS = Parts(elements, expected=logprobs_expected)
CROSS_ENTROPY = Parts(elements, expected=cross_entropy_expected)
