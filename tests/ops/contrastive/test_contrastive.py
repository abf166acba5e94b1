"""The contrastive losses beyond their definition: layouts, gradients of some inputs, how a call travels, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, backends, dtype_of, each_backend
from ops.contrastive.tools import (
    BIAS,
    LOSSES,
    check_gradients,
    check_rows,
    each_exact_backend,
    each_loss,
    features,
    inputs_of,
    scores_of,
    step,
)
from torch import Tensor

from mmkernels import info_nce
from mmkernels.ops.contrastive import strips
from mmkernels.spec import Inputs, cast

# Derivatives.


def _differentiable(op: str, backend: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    inputs = features(3, 4, 2) | (BIAS if op != "info_nce" else {"hard_texts": features(2, dim=2, seed=1)["text"]})
    ids = {"image_ids": torch.tensor([0, 1, 9]), "text_ids": torch.tensor([0, 0, 1, 2])}
    names = tuple(inputs)
    options: Inputs = {} if op != "info_nce" else {"label_smoothing": 0.1, "reduction": "none"}

    def call(*x: Tensor) -> Any:
        return LOSSES[op](**dict(zip(names, x, strict=True)), **ids, **options, backend=backend)

    return call, tuple(x.requires_grad_() for x in inputs.values())


@each_exact_backend
@pytest.mark.parametrize("op", LOSSES)
def test_first_and_second_derivatives(op: str, backend: str) -> None:
    call, inputs = _differentiable(op, backend)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@each_exact_backend
def test_one_direction_s_rows_alone_and_their_derivatives(backend: str) -> None:
    call, inputs = _differentiable("info_nce", backend)
    for place in range(2):
        some = inputs[:3] if place else inputs  # texts have no part in hard texts
        whole = lambda *x: call(*x, *inputs[len(some) :])[place]  # noqa: B023
        assert torch.autograd.gradcheck(whole, some)
        assert torch.autograd.gradgradcheck(whole, some)


# Layouts and dtypes.


@each_backend("info_nce")
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (6, 1), (2, 9)])
@pytest.mark.parametrize("dim", [1, 3])
def test_few_rows(backend: str, n: int, m: int, dim: int) -> None:
    ids = {"image_ids": torch.arange(n) % 2, "text_ids": torch.arange(m) % 2}
    check_rows(backend, features(n, m, dim), **ids)


@each_backend("info_nce")
def test_no_hard_text_is_none(backend: str) -> None:
    inputs = features(7)
    none = cast(inputs, dtype_of("info_nce", backend)) | {
        "hard_texts": torch.zeros(0, 5, dtype=dtype_of("info_nce", backend))
    }
    *without, of_none = step("info_nce", none, backend=backend)
    torch.testing.assert_close(without, list(step("info_nce", cast(inputs, none["image"].dtype), backend=backend)))
    assert of_none.shape == (0, 5)


@each_backend("info_nce")
def test_hard_texts_may_be_the_texts(backend: str) -> None:
    """One tensor as both: its gradients add up."""
    inputs = features(6)
    leaves = {name: x.to(dtype_of("info_nce", backend)).requires_grad_() for name, x in inputs.items()}
    true = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    loss = info_nce(**leaves, hard_texts=leaves["text"], backend=backend)
    logits = true["logit_scale"] * scores_of(true["image"], true["text"])
    rows = torch.cat([logits, logits], 1).logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
    check_gradients((loss,), list(leaves.values()), (rows.mean() / 2,), list(true.values()))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_features_with_a_wide_scale(op: str, backend: str, dtype: torch.dtype) -> None:
    """The loss and the gradient of the scale are float32, and better than what the features' dtype could hold."""
    if backend not in backends(SPECS[op], dtype):
        pytest.skip(f"{backend} does not compute {dtype}")
    inputs = {name: x.to(torch.float32 if x.dim() == 0 else dtype) for name, x in inputs_of(op, n=40).items()}
    found, naive = (step(op, inputs, backend=name) for name in (backend, "reference"))
    truth = step(op, cast(inputs, torch.float64), backend="reference")
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in inputs.values())]
    for mine, other, true in zip(found, naive, truth, strict=True):
        assert SPECS[op].over_budget(mine, other, true) is None
    if backend != "reference":  # which sums in the features' dtype
        torch.testing.assert_close(found[0], truth[0].float())


@each_loss
def test_a_scale_may_be_a_number_or_have_one_element(op: str, backend: str) -> None:
    inputs = cast(inputs_of(op), torch.float32)
    loss, *grads = step(op, inputs, backend=backend)
    names = [name for name, x in inputs.items() if x.dim() == 0]
    others = {name: x for name, x in inputs.items() if name not in names}
    for kind in (lambda x: x.item(), lambda x: x.reshape(1), lambda x: torch.nn.Parameter(x.clone())):
        changed = {name: kind(inputs[name]) for name in names}
        torch.testing.assert_close(LOSSES[op](**others, **changed, backend=backend), loss)
    one = inputs | {name: inputs[name].reshape(1) for name in names}
    for mine, name, want in zip(step(op, one, backend=backend)[1:], inputs, grads, strict=True):
        assert mine.shape == one[name].shape
        torch.testing.assert_close(mine, want.reshape(mine.shape))
    whole = LOSSES[op](**others, **{name: int(inputs[name].item()) for name in names}, backend=backend)
    torch.testing.assert_close(whole, loss)


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("queries", [0, 2])
def test_strips_of_any_height_give_the_same(op: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ids = inputs_of(op, "chunked", n=20, queries=queries), torch.arange(20) % 6
    want = step(op, inputs, image_ids=ids, backend="chunked")
    for rows in (1, 7, 19):
        monkeypatch.setattr(strips, "STRIP_BYTES", rows * 20 * max(queries, 1) * 8)
        torch.testing.assert_close(step(op, inputs, image_ids=ids, backend="chunked"), want)


@each_loss
def test_a_loss_scale_of_float16(op: str, backend: str) -> None:
    """As `torch.amp.GradScaler` begins: the scaled gradients fit, their factor alone does not."""
    if backend == "reference" or backend not in backends(SPECS[op], torch.float16):
        pytest.skip(f"{backend} does not compute float16")
    inputs = features(64, dim=32, scale=5.0) | (BIAS if op == "sigmoid_contrastive" else {})
    inputs = cast(inputs, torch.float16, always_wide=frozenset({"logit_scale", "logit_bias"}))
    wanted, factor = ("image", "text", "logit_scale"), 2.0**16
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss = LOSSES[op](**leaves, backend=backend)
    found = torch.autograd.grad(factor * loss, [leaves[name] for name in wanted])
    exact = {name: x.detach().double().requires_grad_(name in wanted) for name, x in inputs.items()}
    want = torch.autograd.grad(LOSSES[op](**exact, backend="reference"), [exact[name] for name in wanted])
    for x, y in zip(found, want, strict=True):
        assert bool(x.isfinite().all()), backend
        assert float((x.double() / factor - y).norm()) <= 2e-3 * float(y.norm()), backend
