"""The linear ops beside PyTorch's own functions, and what no row may do to another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import dtype_of, each_backend, generator
from torch import Tensor

import mmkernels
from mmkernels.ops.linear.linear_cross_entropy import OP, cross_entropy

ROWS, TOKENS, DIM = 13, 41, 9
NAN, INF = math.nan, math.inf


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns hidden, weight, bias, which want gradients, and targets, of which some are ignored."""
    g = generator(1)
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((ROWS, DIM), (TOKENS, DIM), (TOKENS,))]
    target = torch.randint(TOKENS, (ROWS,), generator=g)
    target[[0, 5]] = -100
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in leaves)
    return hidden, weight, bias, target


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


# Beside PyTorch.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("kind", ["tokens", "probabilities"])
def test_as_cross_entropy(reduction: str, smoothing: float, weighted: bool, kind: str) -> None:
    hidden, weight, bias, target = head()
    if kind == "probabilities":
        target = torch.rand(ROWS, TOKENS, generator=generator(2), dtype=torch.float64).softmax(1)
    classes = torch.rand(TOKENS, generator=generator(3), dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"weight": classes, "label_smoothing": smoothing, "reduction": reduction}
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), target, **options)
    ours = mmkernels.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)
    flow, leaves = torch.rand_like(theirs), (hidden, weight, bias)
    same([ours, *torch.autograd.grad(ours, leaves, flow)], [theirs, *torch.autograd.grad(theirs, leaves, flow)])


def test_z_loss_and_softcap() -> None:
    """By their formulas: the z-loss is divided by the rows, not by their weights."""
    hidden, weight, bias, target = head()
    classes, live = torch.rand(TOKENS, dtype=torch.float64), target != -100
    y = 4.0 * torch.tanh(F.linear(hidden, weight, bias) / 4.0)
    z_loss = 0.1 * (y.logsumexp(1)[live] ** 2).mean()
    theirs = F.cross_entropy(y, target, weight=classes) + z_loss
    found = cross_entropy(
        hidden, weight, target, linear_bias=bias, weight=classes, ignore_index=-100, label_smoothing=0.0,
        reduction="mean", softcap=4.0, z_loss=0.1, group=None, backend=None, return_best=True,
    )  # fmt: skip
    leaves = (hidden, weight, bias)
    same([found.loss, *torch.autograd.grad(found.loss, leaves)], [theirs, *torch.autograd.grad(theirs, leaves)])
    same([found.z_loss], [z_loss.detach()])
    assert torch.equal(found.best_index, y.argmax(1).masked_fill(~live, -1))


def test_several_dims() -> None:
    hidden, weight, _, target = head()
    one = mmkernels.linear_logprobs(hidden[:12], weight, target[:12], return_entropy=True, return_correct=True)
    all_dims = mmkernels.linear_logprobs(
        hidden[:12].reshape(3, 4, DIM), weight, target[:12].reshape(3, 4), return_entropy=True, return_correct=True
    )
    for x, y in zip(one, all_dims, strict=True):
        assert y.shape == (3, 4) and torch.equal(x, y.flatten())
    row = mmkernels.linear_cross_entropy(hidden[1], weight, target[1], reduction="none")
    assert row.shape == ()  # a product of one row may sum in another order than that of twelve
    torch.testing.assert_close(row, -one[0][1], rtol=1e-14, atol=0)


def test_correct_is_the_lowest_of_equals() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    target = torch.tensor([0, 1, 2, -100])
    _, correct = mmkernels.linear_logprobs(torch.ones(4, 1), weight, target, return_correct=True)
    assert correct.tolist() == [False, True, False, False]


def test_ignore_index_may_be_a_token() -> None:
    hidden, weight, _, target = head()
    target = target.masked_fill(target == -100, 3)
    ours = mmkernels.linear_cross_entropy(hidden, weight, target, ignore_index=3)
    same([ours], [F.cross_entropy(F.linear(hidden, weight), target, ignore_index=3)])


@pytest.mark.parametrize("rows", [ROWS, 0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_is_supervised(rows: int, reduction: str) -> None:
    """As in PyTorch the mean is NaN, and the gradients are 0."""
    hidden, weight, _, _ = head()
    target = torch.full((rows,), -100)
    loss = mmkernels.linear_cross_entropy(hidden[:rows], weight, target, reduction=reduction)
    same([loss], [F.cross_entropy(F.linear(hidden[:rows], weight), target, reduction=reduction)])
    assert all(bool((x == 0).all()) for x in torch.autograd.grad(loss.sum(), (hidden, weight)))


# Gradients that are wanted.


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a frozen weight, a frozen input, and within no_grad."""
    calls: list[tuple[bool, ...]] = []
    module = __import__("mmkernels.ops.linear.linear_cross_entropy", fromlist=["OP"])
    monkeypatch.setattr(module, "OP", lambda args, backend: (calls.append(args.keep), OP(args, backend))[1])
    hidden, weight, bias, target = head()
    mmkernels.linear_cross_entropy(hidden, weight.detach(), target).backward()
    mmkernels.linear_cross_entropy(hidden.detach(), weight, target, linear_bias=bias).backward()
    with torch.no_grad():
        mmkernels.linear_cross_entropy(hidden, weight, target)
    assert calls == [(True, False, False), (False, True, True), (False, False, False)]


def test_a_head_tied_to_the_embedding() -> None:
    _, weight, _, target = head()
    tokens = torch.arange(ROWS)
    ours = mmkernels.linear_cross_entropy(F.embedding(tokens, weight), weight, target)
    theirs = F.cross_entropy(F.linear(F.embedding(tokens, weight), weight), target)
    same([*torch.autograd.grad(ours, weight)], [*torch.autograd.grad(theirs, weight)])


@each_backend("linear_cross_entropy", interpreted=False)
def test_gradients_that_were_kept(backend: str) -> None:
    """What flows back multiplies them; a second backward pass finds them as they were."""
    hidden, weight, _, target = head(torch.float32)
    loss = mmkernels.linear_cross_entropy(hidden, weight, target, backend=backend)
    leaves = (hidden, weight)
    once = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    twice = torch.autograd.grad(2.0 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    for x, y, z in zip(once, twice, again, strict=True):
        torch.testing.assert_close(2.0 * x, y)
        assert torch.equal(x, z)
    for _ in range(2):
        mmkernels.linear_cross_entropy(hidden, weight, target, backend=backend).backward()
    torch.testing.assert_close([hidden.grad, weight.grad], [2.0 * x for x in once])


@each_backend("linear_cross_entropy", interpreted=False)
def test_gradients_may_be_written_before_the_next_pass(backend: str) -> None:
    """As clipping does: kept gradients are not handed on themselves with retain_graph=True."""
    hidden, weight, _, target = head(torch.float32)
    loss = mmkernels.linear_cross_entropy(hidden, weight, target, backend=backend)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    torch.testing.assert_close([*torch.autograd.grad(loss, (hidden, weight))], kept, rtol=0.0, atol=0.0)


def test_class_probabilities_in_one_graph() -> None:
    """Without a reduction too, under autocast, and on any device."""
    hidden, weight, _, _ = head(torch.float32)
    target = torch.rand(ROWS, TOKENS, generator=generator(4)).softmax(1)

    def losses(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mmkernels.linear_cross_entropy(hidden, weight, target, reduction="none", z_loss=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), losses(hidden))
    there = [x.detach().to("meta") for x in (hidden, weight, target)]
    assert mmkernels.linear_cross_entropy(*there, reduction="none").shape == (ROWS,)


def test_no_row_in_float16() -> None:
    hidden, weight, _, target = head(torch.float16)
    loss = mmkernels.linear_cross_entropy(hidden, weight, target.fill_(-100), reduction="sum", backend="chunked")
    loss.backward()
    assert not loss.detach() and not hidden.grad.any() and not weight.grad.any()


# Rows that are ignored, hidden tokens, numbers that are not finite.


@each_backend("linear_logprobs")
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_row(backend: str, bad: float) -> None:
    """Its results are lost, those of no other row; in an ignored row nothing is."""
    dtype = dtype_of("linear_logprobs", backend)
    hidden, weight, _, target = (x.detach() for x in head(dtype))
    for row in (0, 3):
        given = hidden.clone()
        given[row, 2] = bad
        given.requires_grad_()
        logprobs, entropy = mmkernels.linear_logprobs(given, weight, target, return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), given)
        lost = torch.zeros(ROWS, dtype=torch.bool)
        lost[row] = row == 3
        for x in (logprobs, entropy, grad.sum(1)):
            assert torch.equal(x.isnan(), lost)


@each_backend("linear_cross_entropy")
def test_a_bad_ignored_row(backend: str) -> None:
    hidden, weight, _, target = (x.detach() for x in head(dtype_of("linear_cross_entropy", backend)))
    clean, dirty = hidden.clone(), hidden.clone()
    dirty[0] = NAN
    clean[0] = 0.0
    weight.requires_grad_()
    losses = [mmkernels.linear_cross_entropy(x, weight, target, backend=backend) for x in (clean, dirty)]
    first, second = (torch.stack([loss.sum(), *torch.autograd.grad(loss, weight)[0].sum(1)]) for loss in losses)
    assert torch.equal(first, second)


@each_backend("linear_logprobs")
def test_hidden_tokens(backend: str) -> None:
    """A bias of -inf takes a token out of the softmax, the entropy and the gradients."""
    dtype = dtype_of("linear_logprobs", backend)
    hidden, weight, bias, _ = (x.detach() for x in head(dtype))
    few = torch.arange(0, TOKENS, 3)
    bias = torch.full_like(bias, -INF).index_copy(0, few, bias[few])
    target = torch.arange(ROWS) % len(few)

    def step(weight: Tensor, bias: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = mmkernels.linear_logprobs(*leaves, target, bias=bias, return_entropy=True, **options)
        return [*found, *torch.autograd.grad(found[0].sum() + found[1].sum(), leaves)]

    ours = step(weight, bias, few[target], backend=backend)
    theirs = step(weight[few], bias[few], target, backend="reference")
    assert bool((ours[3][bias == -INF] == 0).all())
    torch.testing.assert_close([*ours[:3], ours[3][few]], theirs, rtol=1e-4, atol=1e-5)
