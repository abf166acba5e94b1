"""`DeferredLogits`: the same values, gradients, views and writes as logits that a linear layer computes at once."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.integrations.patching.deferred import DeferredLogits, can_defer, defer
from mmkernels.integrations.patching.deferred_tensor import Source

B, L, D, V = 2, 5, 8, 23
F64 = torch.float64
Logits = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def tensors(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((B, L, D), (V, D), (V,)))
    return tuple(x.to(dtype).requires_grad_() for x in (hidden, weight, bias))  # type: ignore[return-value]


LABELS = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))
LABELS[0, :2] = LABELS[1, 3] = -100
TOKENS = LABELS.clamp(min=0)
CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(2), dtype=F64)
SCALE = torch.tensor(0.7, dtype=F64, requires_grad=True)
VECTOR = torch.randn(1, V, generator=torch.Generator().manual_seed(3), dtype=F64)
MASK = LABELS != -100


def causal(logits: Tensor, **options: Any) -> Tensor:
    labels = F.pad(LABELS, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.double().view(-1, V), labels.view(-1), **options)


def capped(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 3.0) * 3.0


def selective(logits: Tensor, index: Tensor) -> Tensor:
    """As TRL computes log-probabilities of float32 logits."""
    chosen = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def selective_narrow(logits: Tensor, index: Tensor) -> Tensor:
    """As TRL computes those of 16-bit logits."""
    rows = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=tokens.unsqueeze(-1)).squeeze(-1)
        for row, tokens in zip(logits, index, strict=True)
    ]
    return torch.stack(rows)


def entropies(logits: Tensor) -> Tensor:
    """As TRL computes entropies."""
    found = []
    for chunk in logits.reshape(-1, V).split(4, dim=0):
        logprobs = F.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(logprobs) * logprobs).sum(-1))
    return torch.cat(found).reshape(logits.shape[:-1])


# What needs no logits
DEFERRED: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": causal,
    "sum": lambda x: causal(x, reduction="sum") / 3,
    "none": lambda x: causal(x, reduction="none"),
    "smoothed": lambda x: causal(x, label_smoothing=0.1),
    "class weights": lambda x: causal(x, weight=CLASS_WEIGHT),
    "ignore index": lambda x: causal(x, ignore_index=-100),
    "sliced": lambda x: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), LABELS[:, 1:].reshape(-1)),
    "module": lambda x: nn.CrossEntropyLoss()(x[:, :-1, :].reshape(-1, x.size(-1)), LABELS[:, 1:].reshape(-1)),
    "masked rows": lambda x: F.cross_entropy(x[MASK], LABELS[MASK]),
    "classes second": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "classes second, permuted": lambda x: F.cross_entropy(x.permute(0, 2, 1), LABELS),
    "back again": lambda x: F.cross_entropy(x.transpose(1, 2).transpose(-1, -2).flatten(0, 1), LABELS.flatten()),
    "scaled": lambda x: causal(2 * x / 0.3 * SCALE),
    "capped": lambda x: causal(capped(x)),
    "capped, scaled": lambda x: causal(-2.0 * capped(1.7 * x) / 0.4),
    "biased": lambda x: causal((x + VECTOR) * 0.5 + VECTOR[0]),
    "capped bias": lambda x: causal(capped(x + VECTOR)),
    "fewer tokens": lambda x: F.cross_entropy(x[..., :20].reshape(-1, 20), TOKENS.clamp(max=19).flatten()),
    "one row": lambda x: F.cross_entropy(x[1, 2], TOKENS[1, 2]),
    "gather": lambda x: x.log_softmax(-1).gather(-1, TOKENS.unsqueeze(-1)),
    "nll": lambda x: F.nll_loss(F.log_softmax(x, dim=-1).view(-1, V), LABELS.view(-1)),
    "selective": lambda x: selective(x / 0.9, TOKENS),
    "selective, narrow": lambda x: selective_narrow(x[:, -3:], TOKENS[:, -3:]),
    "log-sum-exp": lambda x: torch.logsumexp(x, -1),
    "entropies": lambda x: entropies(x[:, :-1]),
    "mean": lambda x: x[MASK].mean(-1),
    "a logit": lambda x: x.gather(-1, TOKENS.unsqueeze(-1)),
    "batch by batch": lambda x: sum(F.cross_entropy(part, TOKENS[i]) for i, part in enumerate(x)),  # type: ignore
    "chunks": lambda x: torch.stack([F.cross_entropy(p[0], t[0]) for p, t in zip(x.chunk(2), TOKENS.chunk(2))]),
    "unsqueezed": lambda x: F.cross_entropy(x.unsqueeze(0).squeeze(0).squeeze(1).flatten(end_dim=1), TOKENS.flatten()),
}
# What reads them
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "softmax": lambda x: F.softmax(x / 2, dim=-1).square(),
    "probabilities as targets": lambda x: F.cross_entropy(x.view(-1, V), torch.softmax(VECTOR, -1).expand(B * L, V)),
    "two logits": lambda x: x.gather(-1, TOKENS[..., None].expand(B, L, 2)),
    "concatenated": lambda x: torch.cat([x, x[:, :1]], 1).logsumexp(-1),
    "stacked": lambda x: torch.stack([x[0], x[1]]).logsumexp(-1),
    "tokens by rows": lambda x: x[:, :, torch.tensor([3, 1])],
    "one token": lambda x: x[..., 3] * x[0, 0, 4],
    "flat": lambda x: x.view(-1)[3:9].pow(2),
    "matmul": lambda x: x @ torch.ones(V, 2, dtype=F64),
    "by rows": lambda x: x * torch.arange(1.0, L + 1, dtype=F64)[:, None],
    "clone": lambda x: x.clone().tanh().tanh(),
    "abs, added": lambda x: x + x.abs(),
    "mixture": lambda x: causal(x) + x.square().mean() + x[:, 0].logsumexp(-1).sum(),
    "in place": lambda x: causal(x.mul_(2.0).div_(SCALE.detach())),
    "written": lambda x: written(x),
    "topk": lambda x: x.float().double().topk(3).values,
    "rows twice": lambda x: x[[0, 1], [2, 3]].exp(),
    "dropped": lambda x: F.dropout(x, 0.0).cos(),
    "max": lambda x: x.max(-1).values,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
}


def written(x: Tensor) -> Tensor:
    last = x[:, -1, :]
    last[:, :4] = -3.0
    x[0, 0, 0] = 5.0
    flat = x.view(-1, V)
    flat.masked_fill_(VECTOR > 1.0, -1.0)
    return causal(x) + last.sum() + x[:, -1].square().sum()


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(self: Source) -> Tensor:
        raise AssertionError("the logits were computed")

    monkeypatch.setattr(Source, "compute", compute)


def results(function: Callable[[Tensor], Tensor], make: Logits, bias: bool) -> list[Tensor]:
    """Returns a function's value and its gradients."""
    hidden, weight, vector = tensors()
    inputs = [hidden, weight, *([vector] if bias else []), SCALE]
    value = function(make(hidden, weight, vector if bias else None))
    upstream = torch.cos(torch.arange(value.numel(), dtype=F64)).view(value.shape)
    grads = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


def same(function: Callable[[Tensor], Tensor], bias: bool) -> None:
    ours, theirs = (results(function, make, bias) for make in (defer, F.linear))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_logits")
@pytest.mark.parametrize("name", DEFERRED)
def test_computes_no_logits(name: str) -> None:
    hidden, weight, bias = tensors()
    DEFERRED[name](defer(hidden, weight, bias))
    with torch.no_grad():
        DEFERRED[name](defer(hidden, weight).detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", DEFERRED)
def test_equals_a_linear_layer(name: str, bias: bool) -> None:
    same(DEFERRED[name], bias)


@pytest.mark.parametrize("name", READ)
def test_equals_a_linear_layer_where_logits_are_read(name: str) -> None:
    same(READ[name], True)


def test_best_token_without_logits(no_logits: None) -> None:
    hidden, weight, bias = tensors()
    logits = F.linear(hidden, weight, bias)
    assert torch.equal(defer(hidden, weight, bias).argmax(-1), logits.argmax(-1))
    assert torch.equal(
        torch.argmax(capped(defer(hidden, weight)), dim=2, keepdim=True), (hidden @ weight.T).argmax(-1, True)
    )


def test_looks_like_a_tensor(no_logits: None) -> None:
    hidden, weight, _ = tensors()
    x = defer(hidden, weight)
    assert isinstance(x, Tensor) and x.shape == (B, L, V) and x.size(-1) == V and x.dim() == x.ndim == 3 and len(x) == B
    assert x.dtype == F64 and x.device == hidden.device and x.numel() == B * L * V and x.is_floating_point()
    assert x.requires_grad and x.grad_fn is not None and not x.is_leaf and x.is_contiguous()
    assert x.transpose(1, 2).shape == (B, V, L) and x.transpose(1, 2).stride() == (L * V, 1, V)
    assert not x.detach().requires_grad and x.float().dtype == torch.float32 and x.half()[0].shape == (L, V)
    assert {x: 1}[x] == 1 and x in {x}
    with torch.no_grad():
        assert not defer(hidden, weight).requires_grad


def test_is_computed_once() -> None:
    hidden, weight, _ = tensors()
    x = defer(hidden, weight)
    wide = x.float()
    assert x.read() is x.read()
    assert torch.equal(wide.cos(), x.read().float().cos())
    wide.read().zero_()
    assert x.abs().sum() > 0


def test_views_share_memory() -> None:
    hidden, weight, _ = tensors()
    with torch.no_grad():
        x = defer(hidden, weight)
        rows, flat = x[:, 1:], x.view(-1, V)
        rows[0, 0] = 7.0
        assert bool((x[0, 1] == 7).all()) and bool((flat[1] == 7).all())
        flat.zero_()
        assert not x.any() and not rows.any()
        copied = (fresh := defer(hidden, weight))[:, 1:].contiguous()
        copied.zero_()
        assert bool(fresh[0, 1].any())


def test_what_is_made_without_gradients_has_none() -> None:
    hidden, weight, _ = tensors()
    with torch.no_grad():
        x = defer(hidden, weight)
        inside = defer(*tensors()[:2])
    assert not causal(x).requires_grad and not x.sum().requires_grad and not x.log_softmax(-1).requires_grad
    (causal(inside * SCALE)).backward()  # a scale outside that needs one
    assert SCALE.grad is not None
    SCALE.grad = None
    made = defer(hidden, weight)
    with torch.no_grad():
        assert not entropies(made).requires_grad and not made.cos().requires_grad
    assert made.cos().requires_grad


class Doubled(torch.autograd.Function):
    """A function of autograd that sees the tensor itself, and doubles its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_function_of_autograd_gets_its_gradient() -> None:
    def loss(x: Tensor) -> Tensor:
        y = Doubled.apply(x)
        return y.cos().sum() + causal(y)

    same(loss, True)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.cos().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -grad * ctx.saved_tensors[0].sin()


def test_a_function_of_autograd_saves_it() -> None:
    same(Through.apply, True)


def test_a_changed_weight_is_an_error() -> None:
    hidden, weight, _ = tensors()
    x, read = defer(hidden, weight), defer(hidden, weight)
    before = read.cos().detach()
    with torch.no_grad():
        weight.add_(1.0)
    for use in (lambda: x.sum(), lambda: causal(x), lambda: x[0], lambda: x.float()):
        with pytest.raises(RuntimeError, match="weight of the output layer is changed"):
            use()
    assert torch.equal(read.cos(), before)


def test_a_freed_weight_is_an_error() -> None:
    hidden, weight, _ = tensors()
    x = defer(hidden, weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight of the output layer is freed"):
        causal(x)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_dtypes_are_those_of_a_linear_layer(autocast: torch.dtype | None) -> None:
    hidden, weight, bias = tensors(torch.float32 if autocast else torch.bfloat16)
    found = []
    for make in (defer, F.linear):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
            x = make(hidden, weight, bias)
            rows = x.view(-1, V)
            inside = F.cross_entropy(rows, LABELS.view(-1))
            values = [x, x.float(), inside, x.log_softmax(-1), x.logsumexp(-1), x * SCALE.float(), x * torch.ones(1)]
        values += [F.cross_entropy(rows, LABELS.view(-1)), F.cross_entropy(rows.float(), LABELS.view(-1)), x / 3]
        (inside + values[-2]).backward()
        found.append(([v.dtype for v in values], torch.stack([inside.double(), values[-2].double()]), weight.grad))
        weight.grad = None
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=5e-2, atol=2e-2)


def test_leaves_the_process_as_a_tensor() -> None:
    hidden, weight, _ = tensors()
    x = defer(hidden, weight).detach()
    expected = (hidden @ weight.T).detach()
    loaded = pickle.loads(pickle.dumps(x))
    buffer = io.BytesIO()
    torch.save({"logits": x}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)["logits"]
    for copied in (
        loaded,
        saved,
        copy.deepcopy(x),
        torch.from_numpy(np.asarray(x)),
        torch.tensor(x.tolist(), dtype=F64),
    ):
        assert type(copied) is Tensor
        torch.testing.assert_close(copied, expected)
    assert "DeferredLogits" not in repr(x)


def test_gradient_of_a_detached_copy() -> None:
    hidden, weight, _ = tensors()
    x = defer(hidden, weight).detach().requires_grad_()
    F.cross_entropy(x.view(-1, V), TOKENS.flatten()).backward()
    y = (hidden @ weight.T).detach().requires_grad_()
    F.cross_entropy(y.view(-1, V), TOKENS.flatten()).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_wrong_targets_are_errors() -> None:
    hidden, weight, _ = tensors()
    with pytest.raises(ValueError, match="target"):
        F.cross_entropy(defer(hidden, weight).view(-1, V), torch.full((B * L,), V))
    with pytest.raises(RuntimeError, match="index must be of tokens"):
        defer(hidden, weight).gather(-1, torch.full((B, L, 1), -1))
    with pytest.raises(RuntimeError):
        defer(hidden, weight).view(7, V)
    with pytest.raises(IndexError):
        defer(hidden, weight)[5]


def quiet_contexts() -> Iterator[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    yield FakeTensorMode()
    yield torch.autograd.forward_ad.dual_level()


def test_is_not_where_every_operator_must_be_seen() -> None:
    hidden, weight, bias = tensors()
    assert can_defer(hidden, weight, bias)
    for context in quiet_contexts():
        with context:
            assert not can_defer(hidden, weight, bias)
    asked = []
    torch.vmap(lambda x: asked.append(can_defer(x, weight, None)) or x)(hidden)  # type: ignore[func-returns-value]
    assert asked == [False]
    assert not can_defer(hidden.float(), weight, None) and not can_defer(hidden, weight[0], None)
    assert not can_defer(hidden, nn.Parameter(weight.detach().to("meta")), None)
    assert not can_defer(torch.nested.nested_tensor([hidden[0]], layout=torch.jagged), weight, None)


def test_compiled_code_takes_it() -> None:
    hidden, weight, bias = tensors()
    torch._dynamo.reset()
    loss = torch.compile(lambda x: causal(x) + x.cos().mean(), backend="eager")
    ours, theirs = loss(defer(hidden, weight, bias)), loss(F.linear(hidden, weight, bias))
    torch.testing.assert_close(ours, theirs)


def test_a_number_that_is_not_finite_is_read() -> None:
    hidden, weight, _ = tensors()
    assert math.isinf(float((defer(hidden, weight) * math.inf).abs().max()))
    assert isinstance(defer(hidden, weight) * 2, DeferredLogits)
