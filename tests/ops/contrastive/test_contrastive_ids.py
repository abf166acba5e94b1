"""Ids of the contrastive ops: any of them, in both modes, against loops over rows; what must change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import dtype_of, each_backend, examples
from hypothesis import given
from hypothesis import strategies as st
from ops.contrastive.tools import HARD, by_loops, check_gradients, check_rows, check_statistics, features, scores_of
from torch import Tensor

from mmkernels import info_nce, sigmoid_contrastive
from mmkernels.runtime import triton as gpu
from mmkernels.spec import Inputs, cast

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
some_examples = examples(60, interpreted=4)

# Ids that share their low 32 bits, that are negative, and that few or all rows share.
POOLS = (
    st.integers(0, 3),
    st.integers(-2, 2),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([5, 5 + 2**32, 5 - 2**32, 5 + 2**62, -(2**63), 2**63 - 1]),
    st.just(0),
)


@st.composite
def ids(draw: st.DrawFn, n: int, m: int) -> dict[str, Tensor]:
    """Of n images and m texts from one pool, or from two that share nothing."""
    pool = draw(st.sampled_from(POOLS))
    found = {"image_ids": _of(draw, pool, n), "text_ids": _of(draw, pool, m)}
    if draw(st.integers(0, 9)) == 0:
        found = {"image_ids": torch.arange(n), "text_ids": torch.arange(n, n + m)}
    return found


def _of(draw: st.DrawFn, pool: st.SearchStrategy[int], count: int) -> Tensor:
    return torch.tensor(draw(st.lists(pool, min_size=count, max_size=count)), dtype=torch.int64)


@each_backend("info_nce")
@some_examples
@given(data=st.data())
def test_any_ids(backend: str, data: st.DataObject) -> None:
    """Values, gradients and statistics, with whatever else a call may have."""
    draw = data.draw
    same_id = draw(st.sampled_from(["positive", "ignore"]))
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    if same_id == "ignore":
        m = n
    inputs = features(n, m, 4, draw(st.sampled_from([0, 0, 1, 3])), seed=draw(st.integers(0, 99)))
    found = draw(ids(n, m))
    if draw(st.booleans()):
        k = draw(st.integers(1, 5))
        inputs["hard_texts"] = features(k, dim=4, seed=100)["text"]
        if draw(st.booleans()):
            pool = st.sampled_from([*found["image_ids"].tolist(), *found["text_ids"].tolist(), 6])
            found["hard_text_ids"] = _of(draw, pool, k)
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.25, 1.0]))
    check_rows(backend, inputs, **found, same_id=same_id, label_smoothing=smoothing)


@each_backend("sigmoid_contrastive")
@some_examples
@given(data=st.data())
def test_any_ids_of_the_sigmoid_loss(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    found = draw(ids(n, m))
    dtype = dtype_of("sigmoid_contrastive", backend)
    inputs = features(n, m, 4, draw(st.sampled_from([0, 0, 1, 3])), seed=draw(st.integers(0, 99)))
    inputs["logit_bias"] = torch.tensor(draw(st.sampled_from([-3.0, 0.0, 1.5])))
    ours = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    true = {name: x.detach().double().requires_grad_() for name, x in ours.items()}
    loss = sigmoid_contrastive(**ours, **found, backend=backend)
    logits = true["logit_scale"] * scores_of(true["image"], true["text"]) + true["logit_bias"]
    signs = [[1.0 if int(a) == int(b) else -1.0 for b in found["text_ids"]] for a in found["image_ids"]]
    want = -F.logsigmoid(torch.tensor(signs) * logits).sum() / n
    torch.testing.assert_close(loss, want.to(dtype))
    check_gradients((loss,), list(ours.values()), (want,), list(true.values()))


# What must change nothing.


def _call(backend: str, inputs: Inputs, **options: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Any]:
    """Rows, gradients of their sum by name, statistics."""
    leaves = {name: x.to(dtype_of("info_nce", backend)).requires_grad_() for name, x in inputs.items()}
    rows, stats = info_nce(**leaves, **options, reduction="none", return_stats=True, backend=backend)
    grads = torch.autograd.grad((2.0 * rows[0]).sum() + rows[1].sum(), list(leaves.values()))
    return rows, dict(zip(leaves, grads, strict=True)), stats


IDS = {"image_ids": torch.tensor([4, 9, 4, -1, 7, 9]), "text_ids": torch.tensor([9, 4, 7, -1, 7, 9, 4, 3, -1])}
SAME = {
    "image_ids": torch.tensor([4, 9, 4, 4, 7, 9]),
    "text_ids": torch.tensor([4, 9, 4, 4, 7, 9]),
    "same_id": "ignore",
}


@each_backend("info_nce")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_another_order_of_texts_gives_another_order_of_rows(backend: str, smoothing: float) -> None:
    inputs = features(6, 9) | HARD
    order = torch.tensor([3, 0, 8, 5, 1, 2, 7, 6, 4])
    rows, grads, stats = _call(backend, inputs, **IDS, label_smoothing=smoothing)
    moved = inputs | {"text": inputs["text"][order], "hard_texts": inputs["hard_texts"].flip(0)}
    other_ids = IDS | {"text_ids": IDS["text_ids"][order]}
    other, other_grads, other_stats = _call(backend, moved, **other_ids, label_smoothing=smoothing)
    torch.testing.assert_close(other, (rows[0], rows[1][order]))
    torch.testing.assert_close(other_stats, stats)
    grads |= {"text": grads["text"][order], "hard_texts": grads["hard_texts"].flip(0)}
    torch.testing.assert_close(other_grads, grads)


@each_backend("info_nce")
@pytest.mark.parametrize("options", [IDS, SAME], ids=["positive", "ignore"])
def test_other_names_of_ids_change_nothing(backend: str, options: dict[str, Any]) -> None:
    inputs = features(6, len(options["text_ids"]))
    want = _call(backend, inputs, **options)
    for rename in (lambda x: x - 2**40, lambda x: -x, lambda x: x * (2**32 + 1)):
        renamed = {name: rename(x) if isinstance(x, Tensor) else x for name, x in options.items()}
        torch.testing.assert_close(_call(backend, inputs, **renamed), want, rtol=0, atol=0, equal_nan=True)


@each_backend("info_nce")
@pytest.mark.parametrize("options", [{}, IDS, SAME], ids=["pairs", "positive", "ignore"])
def test_images_and_texts_may_change_places(backend: str, options: dict[str, Any]) -> None:
    inputs = cast(features(6, 9 if options is IDS else 6), dtype_of("info_nce", backend))
    swapped = options | {"image_ids": options["text_ids"], "text_ids": options["image_ids"]} if options else options
    image, text, scale = (x.requires_grad_() for x in inputs.values())
    call = lambda *x, weight, **more: info_nce(
        *x, scale, **more, image_weight=weight, return_stats=True, backend=backend
    )
    loss, stats = call(image, text, weight=0.3, label_smoothing=0.1, **options)
    other, other_stats = call(text, image, weight=0.7, label_smoothing=0.1, **swapped)
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(tuple(other_stats), tuple(stats[place] for place in (1, 0, 3, 2, 5, 4)))
    leaves = (image, text, scale)
    torch.testing.assert_close(torch.autograd.grad(other, leaves), torch.autograd.grad(loss, leaves))


@each_backend("info_nce")
def test_ids_of_pairs_alone_are_no_ids(backend: str) -> None:
    inputs = features(6) | HARD
    numbers = torch.arange(6) - 3
    for same_id in ("positive", "ignore"):
        got = _call(backend, inputs, image_ids=numbers, text_ids=numbers, same_id=same_id)
        torch.testing.assert_close(got, _call(backend, inputs))


@each_backend("info_nce")
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_one_side_s_ids_serve_for_both(backend: str, same_id: str) -> None:
    inputs, numbers = features(6), SAME["image_ids"]
    want = _call(backend, inputs, image_ids=numbers, text_ids=numbers, same_id=same_id)
    for name in ("image_ids", "text_ids"):
        got = _call(backend, inputs, **{name: numbers}, same_id=same_id)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@each_backend("info_nce")
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_a_queue_with_a_false_negative(backend: str, same_id: str) -> None:
    """A queue of texts as MoCo's, one of which is a caption of an image of the batch, as a user writes it by hand."""
    inputs = cast(features(6) | {"hard_texts": features(5, seed=1)["text"]}, dtype_of("info_nce", backend))
    inputs["hard_texts"][1] = inputs["image"][2]
    image_ids, queue_ids = torch.arange(6), torch.tensor([17, 2, 18, 19, 20])
    image, text, scale, queue = leaves = [x.requires_grad_() for x in inputs.values()]
    loss = info_nce(
        image, text, scale, image_ids=image_ids, same_id=same_id, hard_texts=queue, hard_text_ids=queue_ids,
        backend=backend,
    )  # fmt: skip
    logits = scale * image @ torch.cat([text, queue]).T  # [6, 6 + 5]
    same = torch.cat([torch.eye(6) > 0, image_ids[:, None] == queue_ids], 1)
    if same_id == "positive":  # image 2 has two positives
        target = same / same.sum(1, keepdim=True)
    else:
        target = torch.eye(6, 11)
        logits = logits.masked_fill(same & (target == 0), -1e4)
    want = F.cross_entropy(logits, target.to(logits.dtype)) / 2
    want = want + F.cross_entropy(scale * text @ image.T, torch.arange(6)) / 2
    torch.testing.assert_close(loss, want.to(loss.dtype))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves))
    plain = info_nce(image, text, scale, image_ids=image_ids, same_id=same_id, hard_texts=queue, backend=backend)
    assert abs(float((loss - plain).detach())) > 0.01


@each_backend("info_nce")
def test_ids_of_hard_texts_that_no_image_has_change_nothing(backend: str) -> None:
    inputs = features(6) | HARD
    strange = torch.tensor([60, 61, 60, 62])
    for same_id in ("positive", "ignore"):
        options = SAME | {"same_id": same_id}
        got = _call(backend, inputs, **options, hard_text_ids=strange)
        torch.testing.assert_close(got, _call(backend, inputs, **options))


@each_backend("info_nce", interpreted=False)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_type_and_layout(backend: str, dtype: torch.dtype) -> None:
    inputs = features(6, 9)
    small = {name: x + 1 for name, x in IDS.items()}  # uint8 has no -1
    want = _call(backend, inputs, **small)
    strided = {name: torch.stack([x, x + 50], 1).to(dtype)[:, 0] for name, x in small.items()}
    assert not strided["text_ids"].is_contiguous()
    torch.testing.assert_close(_call(backend, inputs, **strided), want, rtol=0, atol=0, equal_nan=True)
    everything = torch.zeros(1, dtype=dtype).expand(6)  # one id for all, without memory of its own
    rows, grads, _ = _call(backend, features(6), image_ids=everything, text_ids=everything)
    torch.testing.assert_close(_call(backend, features(6), image_ids=torch.zeros(6).long())[:2], (rows, grads))


@each_backend("info_nce")
def test_where_no_row_has_a_positive_the_loss_is_0(backend: str) -> None:
    """A loss of 0, gradients of 0, and no mean of anything."""
    leaves = [x.to(dtype_of("info_nce", backend)).requires_grad_() for x in features(4, 6).values()]
    numbers = {"image_ids": torch.arange(4), "text_ids": torch.arange(4, 10)}
    for smoothing in (0.0, 0.1):
        loss, stats = info_nce(*leaves, **numbers, label_smoothing=smoothing, return_stats=True, backend=backend)
        assert loss == 0 and all(bool((g == 0).all()) for g in torch.autograd.grad(loss, leaves))
        assert all(bool(x.isnan()) for x in stats[:4]) and [int(x) for x in stats[4:]] == [4, 6]


@each_backend("info_nce")
def test_where_all_false_negatives_are_left_out_only_the_pair_remains(backend: str) -> None:
    """A softmax of one: loss and gradients 0 but for rounding, and rank 0."""
    leaves = [x.to(dtype_of("info_nce", backend)).requires_grad_() for x in features(5).values()]
    one = torch.full((5,), 8)
    loss, stats = info_nce(*leaves, image_ids=one, same_id="ignore", return_stats=True, backend=backend)
    for x in (loss, *torch.autograd.grad(loss, leaves)):
        torch.testing.assert_close(x, torch.zeros_like(x))
    assert [float(x) for x in stats] == [1, 1, 0, 0, 0, 0]


@each_backend("info_nce")
def test_ids_and_hard_texts_in_more_than_a_tile(backend: str) -> None:
    """Sizes that no block of a kernel divides; one id has its rows far apart."""
    n, m = (40, 70) if gpu.INTERPRETED else (150, 333)
    numbers = {"image_ids": torch.randint(40, (n,)), "text_ids": torch.randint(50, (m,))}
    numbers["image_ids"][[0, n - 1]], numbers["text_ids"][[0, m - 1]] = 99, 99
    dtype = dtype_of("info_nce", backend)
    inputs = cast(features(n, m, 20) | {"hard_texts": features(37, dim=20, seed=1)["text"]}, dtype)
    numbers["hard_text_ids"] = torch.randint(50, (37,))
    numbers["hard_text_ids"][36] = 99
    rows, stats = info_nce(**inputs, **numbers, reduction="none", return_stats=True, backend=backend)
    want = by_loops(**cast(inputs, torch.float64), **numbers)
    for mine, true in zip(rows, want, strict=True):
        torch.testing.assert_close(mine, true.loss.to(dtype))
    check_statistics(stats, want)
