"""The contrastive losses beyond their definition: derivatives, dtypes, autocast, vmap, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, backends, dtype_of, each_backend, peak_of
from ops.contrastive.tools import (
    BIAS,
    LOSSES,
    check_gradients,
    check_rows,
    each_exact_backend,
    each_loss,
    each_loss_and_backend,
    features,
    inputs_of,
    scores_of,
    step,
)
from torch import Tensor

from mmkernels import info_nce, retrieval_ranks
from mmkernels.ops.contrastive import strips
from mmkernels.ops.contrastive.retrieval_ranks import chunked as ranks_chunked
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
    if backend == "reference" or backend not in backends(SPECS[op], dtype):
        pytest.skip(f"{backend} does not compute {dtype}, or sums in it")
    inputs = {name: x.to(torch.float32 if x.dim() == 0 else dtype) for name, x in inputs_of(op, n=40).items()}
    found = step(op, inputs, backend=backend)
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in inputs.values())]
    truth = LOSSES[op](**cast(inputs, torch.float64), backend="reference")
    torch.testing.assert_close(found[0], truth.float())


@each_loss_and_backend
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


# Autocast and vmap.


@each_loss
def test_autocast(op: str, backend: str) -> None:
    if backend not in backends(SPECS[op], torch.bfloat16):
        pytest.skip(f"{backend} does not compute bfloat16")
    inputs = {name: x.requires_grad_() for name, x in cast(inputs_of(op), torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[op](**inputs, backend=backend)
    narrow = {name: x.bfloat16() if x.dim() else x for name, x in inputs.items()}
    assert loss.dtype == torch.float32 and torch.equal(loss, LOSSES[op](**narrow, backend=backend))
    for grad, x in zip(torch.autograd.grad(loss, list(inputs.values())), inputs.values(), strict=True):
        assert grad.dtype == torch.float32 and grad.shape == x.shape and float(grad.abs().max()) > 0
    for dtype in (torch.bfloat16, torch.float16):  # a scale that another module made under autocast
        with torch.autocast("cpu", torch.bfloat16):
            other = LOSSES[op](**inputs | {"logit_scale": inputs["logit_scale"].detach().to(dtype)}, backend=backend)
        torch.testing.assert_close(other, loss, rtol=0.02, atol=0.0)
    if dtype_of(op, backend) == torch.float64:
        with torch.autocast("cpu", torch.bfloat16):  # float64 stays: it was chosen on purpose
            assert LOSSES[op](**inputs_of(op), backend=backend).dtype == torch.float64


@each_exact_backend
@pytest.mark.parametrize("op", LOSSES)
def test_vmap_over_batches_that_share_ids_and_scale(op: str, backend: str) -> None:
    batches = [inputs_of(op, seed=seed) for seed in range(3)]
    ids = torch.arange(7) % 3
    call = lambda image, text: LOSSES[op](
        **{**batches[0], "image": image, "text": text}, image_ids=ids, backend=backend
    )
    images, texts = (torch.stack([x[name] for x in batches]) for name in ("image", "text"))
    leaves = [images.transpose(0, 1).requires_grad_(), texts.requires_grad_(), batches[0]["logit_scale"]]
    leaves[2].requires_grad_()
    together = torch.func.vmap(call, in_dims=(1, 0))(*leaves[:2])
    apart = torch.stack([call(leaves[0][:, n], leaves[1][n]) for n in range(3)])
    torch.testing.assert_close(together, apart)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=apart.dtype)
    got, want = (torch.autograd.grad(x, leaves, weights) for x in (together, apart))
    torch.testing.assert_close(got, want)
    shared = torch.func.vmap(call, in_dims=(1, None))(leaves[0], batches[0]["text"])  # one side alone is batched
    assert bool(torch.autograd.grad(shared.sum(), leaves[0])[0].any())


# Memory.

_PAIRS, _MIB = 4096, 2**20


@pytest.mark.parametrize(
    ("op", "backend"), [(op, x) for op in (*LOSSES, "retrieval_ranks") for x in backends(SPECS[op]) if x != "reference"]
)
def test_memory_is_linear(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of this call are 64 MiB, features and their gradients 4 MiB."""
    _smaller_strips(monkeypatch)
    inputs = cast(features(_PAIRS, dim=64, scale=20.0) | BIAS, torch.float32)
    ids = torch.arange(_PAIRS) // 2

    def run() -> None:
        if op == "retrieval_ranks":
            retrieval_ranks(inputs["image"], inputs["text"], ids, backend=backend)
        elif op == "info_nce":
            features_and_scale = {name: x for name, x in inputs.items() if name != "logit_bias"}
            step(op, features_and_scale, image_ids=ids, text_ids=ids, backend=backend)
        else:
            step(op, inputs, image_ids=ids, text_ids=ids, backend=backend)

    assert peak_of(run) < 12 * _MIB


@pytest.mark.parametrize("backend", [x for x in backends(SPECS["info_nce"]) if x != "reference"])
def test_memory_does_not_know_how_long_a_queue_is(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are 64 MiB, its features 4 MiB (8 in a wide copy)."""
    _smaller_strips(monkeypatch)
    inputs = cast(features(256, dim=16) | {"hard_texts": features(2**16, dim=16, seed=1)["text"]}, torch.float32)
    assert peak_of(lambda: step("info_nce", inputs, ("image", "text"), backend=backend)) < 16 * _MIB


def _smaller_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the problems here are smaller than what strips are for."""
    for module in (strips, ranks_chunked):
        monkeypatch.setattr(module, "STRIP_BYTES", _MIB)
