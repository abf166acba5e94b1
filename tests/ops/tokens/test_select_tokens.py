"""`select_tokens`: order, ties and NaN; merging by the papers' formulas; budgets; bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from harness import each_backend, examples, generator
from hypothesis import given
from hypothesis import strategies as st
from ops.cpu_tools import each_dtype, each_isa, needs_kernels
from torch import Tensor

from mmkernels import select_tokens
from mmkernels.ops.tokens.select_tokens import chunked
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu

NAN, INF = math.nan, math.inf


def _order(scores: Tensor) -> list[int]:
    """All tokens, the best first: Python's sort is stable."""
    value = lambda at: (math.isnan(scores[at]), -float(scores[at].nan_to_num(0.0, INF, -INF)))
    return sorted(range(len(scores)), key=value)


def _by_hand(
    x: Tensor, lengths: tuple[int, ...], keep: list[int], scores: Tensor, over: str, merge: str, metric: Tensor
) -> tuple[Tensor, list[int], list[int]]:
    """Tokens, lengths and index, one token after the other."""
    starts = [sum(lengths[:image]) for image in range(len(lengths))]
    if over == "batch":
        chosen = sorted(_order(scores)[: keep[0]])
    else:
        images = zip(starts, lengths, keep, strict=True)
        chosen = [at + first for first, n, k in images for at in sorted(_order(scores[first : first + n])[:k])]
    rows, counts = [], []
    for first, n in zip(starts, lengths, strict=True):
        kept = [at for at in chosen if first <= at < first + n]
        counts.append(len(kept))
        into: dict[int, list[int]] = {at: [] for at in kept}
        for at in range(first, first + n):
            if merge and kept and at not in into:
                cosine = torch.nn.functional.cosine_similarity(metric[at], metric[kept], dim=1, eps=0.0)
                into[kept[int(cosine.nan_to_num(nan=0.0).argmax())]].append(at)
        for at, others in into.items():
            row = x[at]
            if others and merge == "mean":
                row = x[[at, *others]].mean(0)
            elif others and merge == "visionzip":
                row = row + x[others].mean(0)
            elif others and merge == "prumerge":
                row = row + (scores[others, None] * x[others]).sum(0)
            rows.append(row)
    return torch.stack(rows) if rows else x[:0], counts, chosen


@each_backend("select_tokens")
@examples(30, interpreted=1)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 30, 75]), max_size=4).map(tuple),
    share=st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    over=st.sampled_from(["image", "batch"]),
    merge=st.sampled_from(["", "mean", "visionzip", "prumerge"]),
    channels=st.sampled_from([1, 5, 40, 130]),
    number=st.integers(0, 1000),
)
def test_against_one_token_after_the_other(
    backend: str, lengths: tuple[int, ...], share: float, over: str, merge: str, channels: int, number: int
) -> None:
    random = generator(number)
    x = torch.randn(sum(lengths), channels, generator=random).requires_grad_()
    metric = torch.randn(sum(lengths), 9, generator=random)
    scores = torch.randint(-3, 4, (sum(lengths),), generator=random).float()
    if not merge:
        scores[torch.rand(sum(lengths), generator=random) < 0.2] = NAN
    keep = [math.ceil(share * n) for n in (lengths if over == "image" else (sum(lengths),))]
    more: Any = {"merge_rest": merge, "metric": metric} if merge else {}
    found = select_tokens(x, lengths, share, scores, over=over, backend=backend, **more)
    want, counts, index = _by_hand(x, lengths, keep, scores, over, merge, metric)
    assert found.positions.tolist() == index
    assert torch.as_tensor(found.lengths).tolist() == counts
    torch.testing.assert_close(found.x, want, rtol=1e-5, atol=1e-5)
    flow = torch.randn(want.shape, generator=random)
    if len(flow):
        torch.testing.assert_close(*(torch.autograd.grad(y, x, flow)[0] for y in (found.x, want)), rtol=1e-5, atol=1e-5)


@each_backend("select_tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_order_of_equal_and_of_nan_scores(backend: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([NAN, -INF, 0.0, -0.0, INF, NAN, 0.0, 1e-45, -1e-45, -NAN], dtype=dtype)
    x, order = torch.arange(10.0)[:, None], [4, 7, 2, 3, 6, 8, 1, 0, 5, 9]
    for keep in (8,) if gpu.INTERPRETED else range(1, 11):
        found = select_tokens(x, [10], keep, scores, backend=backend)
        assert found.positions.tolist() == sorted(order[:keep])
        assert found.x.flatten().tolist() == sorted(order[:keep])


@needs_kernels
def test_scores_in_float64_are_not_rounded() -> None:
    scores = 1 + 1e-12 * torch.tensor([0.0, 3, 1, 2], dtype=torch.float64)
    assert select_tokens(torch.zeros(4, 2), [4], 2, scores, backend="cpu").positions.tolist() == [1, 3]


@needs_kernels
@pytest.mark.parametrize("kind", ["uniform", "few values", "one digit", "all equal"])
def test_the_best_of_many(kind: str) -> None:
    n = 50_000
    scores = torch.rand(n) if kind == "uniform" else torch.randint(7, (n,)).float()
    scores = 1 + scores * 2**-23 if kind == "one digit" else scores.fill_(2.0) if kind == "all equal" else scores
    order = scores.argsort(descending=True, stable=True)
    for keep in (1, 2, 999, 25_000, n - 1, n):
        found = select_tokens(torch.zeros(n, 1), [n], keep, scores, backend="cpu")
        assert torch.equal(found.positions, order[:keep].sort().values)


@each_backend("select_tokens")
def test_what_is_the_nearest(backend: str) -> None:
    """By angle, not by length; of equal ones the first; NaN, and a row of zeros, are never nearer than another."""
    x = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.1, 0.0], [0.1, 0.0], [5.0, 1.0], [NAN, 1.0], [1.0, 1.1]])
    scores = torch.tensor([1.0, 1, 1, 1, 0, 1, 0])
    found = select_tokens(x, [7], 5, scores, merge_rest="visionzip", backend=backend)
    assert found.positions.tolist() == [0, 1, 2, 3, 5]
    want = torch.tensor([[0.0, 0.0], [10.0, 10.1], [5.1, 1.0], [0.1, 0.0], [NAN, 1.0]])
    torch.testing.assert_close(found.x, want, equal_nan=True)


@each_backend("select_tokens")
def test_how_large_rows_are_does_not_matter(backend: str) -> None:
    """Nor whether their squares are floats. On "triton" products of two rows must be."""
    powers = (-14, 14) if backend == "triton" else (-30, 30)
    metric, scores = torch.randn(40, 8), torch.rand(40)
    more: dict[str, Any] = {"lengths": [40], "keep": 9, "scores": scores, "merge_rest": True, "backend": backend}
    sizes = 10.0 ** torch.randint(powers[0], powers[1] + 1, (40, 1)).double()
    found = select_tokens(metric, metric=(metric * sizes).float(), **more)
    torch.testing.assert_close(found.x, select_tokens(metric, metric=metric, **more).x)


@needs_kernels
@each_isa
@each_dtype
@pytest.mark.parametrize("channels", [3, 64, 1001])
def test_tiles_of_every_instruction_set(isa: str, dtype: torch.dtype, channels: int) -> None:
    """More kept tokens than a panel, more others than a tile, channels that no vector divides."""
    x = torch.randn(333, channels).to(dtype)
    scores = torch.rand(333)
    with cpu.use_isa(isa):
        found = select_tokens(x, (200, 133), (130, 65), scores, merge_rest=True, backend="cpu")
    want = select_tokens(x.double(), (200, 133), (130, 65), scores, merge_rest=True, backend="reference")
    assert torch.equal(found.positions, want.positions)
    off = (found.x.double() - want.x).norm(dim=1) > 0.02 * want.x.norm(dim=1)
    assert int(off.sum()) <= (2 if channels == 3 else 0)  # two similarities may be equal but for rounding


def test_strips_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scores = torch.randn(100, 16, dtype=torch.float64), torch.rand(100)
    inputs: dict[str, Any] = {"x": x, "lengths": (60, 40), "scores": scores, "merge_rest": True}
    for more in ({"keep": 0.2}, {"keep": 17, "over": "batch"}):
        want = select_tokens(**inputs, **more, backend="reference")
        monkeypatch.setattr(chunked, "STRIP_BYTES", 500)
        torch.testing.assert_close(select_tokens(**inputs, **more, backend="chunked"), want)


@each_backend("select_tokens", interpreted=False)
@pytest.mark.parametrize("merge", [False, True])
def test_many_images_and_a_large_one(backend: str, merge: bool) -> None:
    for lengths, keep in (((31, 40) * 100, (3, 7) * 100), ((10_000,), (300,))):
        x, scores = torch.randn(sum(lengths), 8), torch.rand(sum(lengths))
        found = select_tokens(x, lengths, keep, scores, merge_rest=merge, backend=backend)
        first, at = 0, 0
        for n, k in zip(lengths, keep, strict=True):
            want = scores[first : first + n].topk(k).indices.sort().values + first
            assert torch.equal(found.positions[at : at + k], want)
            first, at = first + n, at + k
        if merge:  # nothing is lost
            more: Any = {"merge_rest": "prumerge", "metric": x, "backend": backend}
            total = select_tokens(torch.ones(len(x), 1), lengths, keep, scores, **more).x.sum()
            rest = scores.sum() - scores[found.positions].sum()
            torch.testing.assert_close(total, sum(keep) + rest)


@each_backend("select_tokens", interpreted=False)
def test_a_metric_of_another_dtype(backend: str) -> None:
    """As keys are beside hidden states under autocast."""
    metric, scores = torch.randn(30, 16), torch.rand(30)
    inputs: dict[str, Any] = {"lengths": [30], "keep": 6, "scores": scores, "merge_rest": True, "backend": backend}
    for x in (torch.randn(30, 4), torch.randn(30, 4).bfloat16()):
        for dtype in (torch.bfloat16, torch.float64):
            want = select_tokens(x, metric=metric.to(dtype).float(), **inputs)
            torch.testing.assert_close(select_tokens(x, metric=metric.to(dtype), **inputs).x, want.x)


def test_forms_of_results() -> None:
    x, scores = torch.randn(2, 6, 4), torch.rand(2, 6)
    kept = select_tokens(x, 6, 2, scores)
    assert kept.x.shape == (2, 2, 4) and kept.lengths == 2 and kept.positions.shape == (2, 2)
    assert torch.equal(kept.x, x.flatten(0, 1)[kept.positions])
    kept = select_tokens(x, 6, 0.25, scores, over="batch")
    assert isinstance(kept.lengths, Tensor) and kept.x.shape == (3, 4) and int(kept.lengths.sum()) == 3
    x, scores = x.flatten(0, 1), scores.flatten()
    lengths = select_tokens(x, torch.tensor([5, 7]), (1, 2), scores).lengths
    assert isinstance(lengths, Tensor) and lengths.tolist() == [1, 2]
    assert select_tokens(x, [5, 7], 1.0, scores).lengths == (5, 7)
    assert select_tokens(torch.zeros(60, 2), [30, 30], 0.1, torch.zeros(60)).lengths == (3, 3)  # 0.1 * 30 > 3
    assert select_tokens(torch.zeros(0, 6, 4), 6, 2, torch.zeros(0, 6)).x.shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("lengths", "keep", "plain"),
    [
        ([np.int64(5), np.int32(4)], np.int64(2), 2),
        ([5, 4], [np.int64(2), np.uint8(1)], [2, 1]),
        ([5, 4], np.float32(0.5), 0.5),
    ],
)
def test_numbers_of_numpy(lengths: Any, keep: Any, plain: Any) -> None:
    x, scores = torch.randn(9, 8), torch.rand(9)
    kept, want = select_tokens(x, lengths, keep, scores), select_tokens(x, [5, 4], plain, scores)
    assert torch.equal(kept.positions, want.positions) and kept.lengths == want.lengths


def test_no_tensor_is_kept_for_the_backward_pass() -> None:
    x, kept = torch.randn(500, 64, requires_grad=True), []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    for merge in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            select_tokens(x, [500], 50, torch.rand(500), merge_rest=merge)
    assert all(saved.untyped_storage().nbytes() <= 500 * 8 for saved in kept)


def test_visionzip() -> None:
    """Tokens that dominate; of those that are left every fourth, made contextual by the mean of its nearest."""
    x, keys, attention = torch.randn(24, 16), torch.randn(24, 8), torch.rand(24)
    dominant = select_tokens(x, [24], 4, attention)
    left = torch.ones(24, dtype=torch.bool).index_fill(0, dominant.positions, False)
    targets = (torch.arange(20) % 4 == 0).float()
    contextual = select_tokens(x[left], [20], 5, targets, merge_rest="visionzip", metric=keys[left])
    unit = torch.nn.functional.normalize(keys[left], dim=1)
    target, rest = torch.arange(0, 20, 4), torch.arange(20)[torch.arange(20) % 4 != 0]
    nearest = (unit[rest] @ unit[target].mT).argmax(1)
    one_hot = torch.nn.functional.one_hot(nearest, 5).float()
    want = x[left][target] + one_hot.mT @ x[left][rest] / one_hot.sum(0).clamp(min=1)[:, None]
    torch.testing.assert_close(contextual.x, want)


GOOD: dict[str, Any] = {"x": torch.zeros(9, 8), "lengths": (5, 4), "keep": 2, "scores": torch.zeros(9)}
BATCH: dict[str, Any] = {"x": torch.zeros(2, 5, 8), "lengths": 5, "keep": 2, "scores": torch.zeros(2, 5)}

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x a list": (GOOD | {"x": [0.0]}, TypeError, r"x must be a tensor, got list"),
    "x 1-D": (GOOD | {"x": torch.zeros(9)}, ValueError, r"x must be \[tokens, C\] or .*got shape \(9,\)"),
    "lengths": (GOOD | {"lengths": (5, 5)}, ValueError, r"lengths must match x's 9 tokens, got 10 in 2 images"),
    "negative length": (GOOD | {"lengths": (10, -1)}, ValueError, r"lengths must be 0 or more, got -1"),
    "keep of 0": (GOOD | {"keep": 0}, ValueError, r"keep must be from 1 to 5 for image 0 of 5 tokens, got 0"),
    "keep too many": (GOOD | {"keep": 5}, ValueError, r"keep must be from 1 to 4 for image 1 of 4 tokens, got 5"),
    "keep of each": (GOOD | {"keep": (1, 5)}, ValueError, r"keep must be from 1 to 4 for image 1 .*, got 5"),
    "keep of an empty image": (
        GOOD | {"lengths": (9, 0)},
        ValueError,
        r"keep must be from 0 to 0 for image 1 of 0 tokens, got 2",
    ),
    "keep for three": (GOOD | {"keep": (1, 1, 1)}, ValueError, r"keep must be for 2 images, got 3 numbers"),
    "keep a share of 0": (GOOD | {"keep": 0.0}, ValueError, r"keep must be above 0 and at most 1 .*, got 0.0"),
    "keep a share above 1": (GOOD | {"keep": 1.5}, ValueError, r"keep must be above 0 and at most 1 .*, got 1.5"),
    "lengths in rows": (GOOD | {"lengths": torch.tensor([[5, 4]])}, ValueError, r"lengths must be .* shape \(1, 2\)"),
    "keep NaN": (GOOD | {"keep": NAN}, ValueError, r"keep must be above 0 and at most 1 .*, got nan"),
    "keep a bool": (GOOD | {"keep": True}, TypeError, r"keep must be a number of tokens, one for.*, got bool"),
    "keep a string": (GOOD | {"keep": "all"}, TypeError, r"keep must be integers, .*, got str"),
    "keep shares": (GOOD | {"keep": (0.5, 0.5)}, TypeError, r"keep must be integers, .*, got float"),
    "keep of a batch": (
        BATCH | {"keep": (1, 2)},
        ValueError,
        r"keep must be the same for all images of .*, got 1 and 2",
    ),
    "budget too large": (
        GOOD | {"keep": 10, "over": "batch"},
        ValueError,
        r"keep must be from 1 to 9 for 9 .*, got 10",
    ),
    "budget of each": (GOOD | {"keep": (1, 2), "over": "batch"}, TypeError, r"keep must be a number .*, got tuple"),
    "scores a list": (GOOD | {"scores": [0.0] * 9}, TypeError, r"scores must be a tensor, got list"),
    "scores integers": (GOOD | {"scores": torch.zeros(9).int()}, TypeError, r"scores must be float16.*got torch.int32"),
    "scores' shape": (
        BATCH | {"scores": torch.zeros(10)},
        ValueError,
        r"scores must be \[2, 5\], one for each token, got shape \(10,\)",
    ),
    "scores' device": (
        GOOD | {"scores": torch.zeros(9, device="meta")},
        ValueError,
        r"scores must be on x's device cpu, got meta",
    ),
    "over": (GOOD | {"over": "video"}, ValueError, r"over must be one of image, batch, got 'video'"),
    "merge": (GOOD | {"merge_rest": "sum"}, ValueError, r"merge_rest must be a bool or one of mean, .*, got 'sum'"),
    "merge 1": (GOOD | {"merge_rest": 1}, TypeError, r"merge_rest must be a bool or one of mean, .*, got int"),
    "metric alone": (GOOD | {"metric": torch.zeros(9, 3)}, ValueError, r"metric must be None without merge_rest"),
    "metric's shape": (
        GOOD | {"merge_rest": True, "metric": torch.zeros(8, 3)},
        ValueError,
        r"metric must be \[9, D\], a row for each token, got shape \(8, 3\)",
    ),
    "metric's channels": (
        GOOD | {"merge_rest": True, "metric": torch.zeros(9, 0)},
        ValueError,
        r"metric must have at least one channel, got shape \(9, 0\)",
    ),
    "x's channels": (
        GOOD | {"merge_rest": True, "x": torch.zeros(9, 0)},
        ValueError,
        r"x must have at least one channel with merge_rest, got shape \(9, 0\)",
    ),
    "metric integers": (
        GOOD | {"merge_rest": True, "metric": torch.zeros(9, 3).int()},
        TypeError,
        r"metric must be float16.*got torch.int32",
    ),
    "metric's device": (
        GOOD | {"merge_rest": True, "metric": torch.zeros(9, 3, device="meta")},
        ValueError,
        r"metric must be on x's device cpu, got meta",
    ),
    "backend": (GOOD | {"backend": "gpu"}, ValueError, r"backend must be one of .*, or None; got 'gpu'"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_refused_by_name(inputs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        select_tokens(**inputs)
