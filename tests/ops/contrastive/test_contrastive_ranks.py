"""Ranks: the statistics of `info_nce`, and `retrieval_ranks`, of equal scores, NaN, rows without a right answer."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from harness import DTYPES, SPECS, backends, dtype_of, each_backend, examples, generator
from hypothesis import given
from hypothesis import strategies as st
from ops.contrastive.tools import Rows, by_loops, check_rows, check_statistics, features
from torch import Tensor

from mmkernels import info_nce, retrieval_ranks
from mmkernels.ops.contrastive import strips
from mmkernels.ops.contrastive.retrieval_ranks import chunked as ranks_chunked
from mmkernels.runtime import triton as gpu
from mmkernels.spec import Inputs, cast

NAN, INF = math.nan, math.inf
some_examples = examples(60, interpreted=4)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, whose scores are exact in every dtype and order of summation: many are equal."""
    return torch.randint(-1, 2, shape, generator=generator(seed)).double()


def _statistics(
    backend: str, inputs: Inputs, dtype: torch.dtype | None = None, **options: Tensor
) -> tuple[Tensor, ...]:
    dtype = dtype_of("info_nce", backend) if dtype is None else dtype
    given = cast(inputs, dtype, always_wide=frozenset({"logit_scale"}))
    found: tuple[Tensor, ...] = info_nce(**given, **options, return_stats=True, backend=backend)[1]
    return found


@each_backend("info_nce")
def test_the_statistics_have_the_names_that_are_documented(backend: str) -> None:
    """One image of three is taken for another's, by both sides; a fourth has no text, and a fifth text no image."""
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.25], [0, 0, 1]])
    text = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0.25, 0.5], [0.5, 0.5, 0.0]])
    ids = {"image_ids": torch.tensor([1, 0, 2, 9]), "text_ids": torch.tensor([0, 1, 2, 8])}
    stats = info_nce(image, text, 2.0, **ids, return_stats=True, backend=backend)[1]
    # Image 2 scores 0.5 with text 0 before its own 0.25; text 2 scores 0.5 with image 3, and 0.25 with image 1, which
    # stands before image 2.
    assert float(stats.image_accuracy) == pytest.approx(2 / 3) == float(stats.text_accuracy)
    assert float(stats.image_mean_rank) == pytest.approx(1 / 3) and float(stats.text_mean_rank) == pytest.approx(2 / 3)
    assert int(stats.images_without_positive) == 1 and int(stats.texts_without_positive) == 1


@each_backend("info_nce")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [3.0, -3.0, 0.0])
def test_of_equal_scores_the_lower_index_stands_first(backend: str, dtype: torch.dtype, scale: float) -> None:
    if backend not in backends(SPECS["info_nce"], dtype):
        pytest.skip(f"{backend} does not compute {dtype}")
    for inputs, options, want in _equal_scores(scale):
        check_statistics(_statistics(backend, inputs, dtype, **options), want)


@cache
def _equal_scores(scale: float) -> list[tuple[Inputs, Inputs, tuple[Rows, Rows]]]:
    """Inputs, ids, and what the loops say, which is the same in every dtype."""
    n, m = (12, 20) if gpu.INTERPRETED else (40, 70)
    several = {"image": whole(n, 4), "text": whole(m, 4, seed=1), "logit_scale": torch.tensor(scale).double()}
    pairs = several | {"text": several["text"][:n]}
    numbers = {"image_ids": torch.arange(n) % 9, "text_ids": torch.arange(m) % 11}
    hard = {"hard_texts": whole(15, 4, seed=2)}
    calls = ((pairs, {}), (pairs | hard, {}), (several, numbers), (several | hard, numbers))
    return [(inputs, options, by_loops(**inputs, **options)) for inputs, options in calls]


@pytest.mark.parametrize("rows", [1, 7, 39])
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_strips_of_any_height_count_the_same(rows: int, same_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked backend's; equal scores lie on both sides of a strip's edge."""
    n, m = 40, 40 if same_id == "ignore" else 70
    monkeypatch.setattr(strips, "STRIP_BYTES", rows * 8 * m)
    inputs = {"image": whole(n, 4), "text": whole(m, 4, seed=1), "logit_scale": torch.tensor(2.0).double()}
    inputs["hard_texts"] = whole(15, 4, seed=2)
    options = {"image_ids": torch.arange(n) % 9, "text_ids": torch.arange(m) % 11, "same_id": same_id}
    check_rows("chunked", inputs, **options)
    monkeypatch.setattr(ranks_chunked, "STRIP_BYTES", rows * 8 * m)
    target = torch.arange(n) * 7 % m
    got = retrieval_ranks(inputs["image"], inputs["text"], target, backend="chunked")
    assert torch.equal(got, _ranks(inputs["image"], inputs["text"], target))


@each_backend("info_nce")
def test_duplicate_captions_without_ids(backend: str) -> None:
    """Of ten captions in a row that are one text the first image's stands first, the tenth's last."""
    image, text = torch.eye(4).repeat_interleave(10, 0), torch.eye(4).repeat_interleave(10, 0)
    stats = info_nce(image, text, 10.0, return_stats=True, backend=backend)[1]
    assert [float(x) for x in stats] == pytest.approx([0.1, 0.1, 4.5, 4.5, 0, 0])
    ids = torch.arange(40) // 10
    assert [float(x) for x in info_nce(image, text, 10.0, image_ids=ids, return_stats=True, backend=backend)[1]] == [
        1, 1, 0, 0, 0, 0,
    ]  # fmt: skip


@each_backend("info_nce")
@pytest.mark.parametrize("n", [1, 2, 33])
def test_equal_features_have_the_mean_rank_of_a_guess(backend: str, n: int) -> None:
    ones = torch.ones(n, 4)
    stats = info_nce(ones, ones, 5.0, return_stats=True, backend=backend)[1]
    assert [float(x) for x in stats] == pytest.approx([1 / n, 1 / n, (n - 1) / 2, (n - 1) / 2, 0, 0])
    stats = info_nce(ones, ones, 5.0, hard_texts=torch.ones(7, 4), return_stats=True, backend=backend)[1]
    assert float(stats.image_mean_rank) == (n - 1) / 2, "a hard text of the same score comes after all texts"
    stats = info_nce(ones, ones, 5.0, hard_texts=2 * torch.ones(7, 4), return_stats=True, backend=backend)[1]
    assert float(stats.image_mean_rank) == (n - 1) / 2 + 7 and float(stats.text_mean_rank) == (n - 1) / 2


@each_backend("info_nce")
def test_nan_stands_last(backend: str) -> None:
    """A row whose right answer is NaN has all its negatives before it; NaN elsewhere stands before nothing."""
    image, text = 3 * torch.eye(5), torch.eye(5) + 0.1
    image[2, 0] = NAN
    stats = info_nce(image, text, 1.0, return_stats=True, backend=backend)[1]
    assert [float(x) for x in stats] == pytest.approx([0.8, 0.8, 4 / 5, 4 / 5, 0, 0])
    hard = torch.full((3, 5), NAN)
    stats = info_nce(image, text, 1.0, hard_texts=hard, return_stats=True, backend=backend)[1]
    assert [float(x) for x in stats] == pytest.approx([0.8, 0.8, 7 / 5, 4 / 5, 0, 0])


@each_backend("info_nce", interpreted=False)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_statistics_change_no_loss(backend: str, reduction: str) -> None:
    inputs = cast(features(9), dtype_of("info_nce", backend))
    leaves = [x.requires_grad_() for x in inputs.values()]
    alone = info_nce(*leaves, reduction=reduction, backend=backend)
    loss, stats = info_nce(*leaves, reduction=reduction, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    assert not any(x.requires_grad for x in stats)


# Retrieval.


def _ranks(query: Tensor, gallery: Tensor, target: Tensor) -> Tensor:
    """Places in a stable descending sort, for which NaN is less than all else."""
    scores = (query.double() @ gallery.double().T).nan_to_num(-1e300, 1e200, -1e200)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    found = (order == target[:, None]).int().argmax(1)
    right = (query * gallery[target]).double().sum(1)
    return torch.where(right.isnan(), len(gallery) - 1, found)


@each_backend("retrieval_ranks")
@some_examples
@given(data=st.data())
def test_any_sizes(backend: str, data: st.DataObject) -> None:
    n, m, dim = (data.draw(st.integers(*ends)) for ends in ((0, 20), (1, 150), (1, 9)))
    dtype = data.draw(st.sampled_from([x for x in DTYPES if backend in backends(SPECS["retrieval_ranks"], x)]))
    query, gallery = whole(n, dim, seed=n).to(dtype), whole(m, dim, seed=m + 1).to(dtype)
    target = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n)), dtype=torch.int64)
    got = retrieval_ranks(query, gallery, target, backend=backend)
    assert got.dtype == torch.int64 and torch.equal(got, _ranks(query, gallery, target))


@each_backend("retrieval_ranks")
def test_retrieval_of_nan_and_infinity(backend: str) -> None:
    query, gallery = whole(8, 4, seed=5).abs().float() + 1, whole(30, 4, seed=6).abs().float() + 1
    query[3], gallery[7, 1], gallery[9, 0], gallery[11, 2] = NAN, NAN, INF, -INF
    for answer in (0, 7, 9, 11, 29):
        target = torch.full((8,), answer)
        got = retrieval_ranks(query, gallery, target, backend=backend)
        assert torch.equal(got, _ranks(query, gallery, target)), answer
    assert got[3] == 29  # a query of NaN
    assert retrieval_ranks(query[:1], gallery, torch.tensor([9]), backend=backend).item() == 0


@each_backend("retrieval_ranks")
def test_recall_of_what_is_in_the_gallery_itself(backend: str) -> None:
    """Each item is nearest to itself; in reverse order too, and among its own opposites last."""
    items = cast(features(60, dim=16), dtype_of("retrieval_ranks", backend))["image"]
    places = torch.arange(60)
    assert bool((retrieval_ranks(items, items, places, backend=backend) == 0).all())
    assert bool((retrieval_ranks(items.flip(0), items, places.flip(0), backend=backend) == 0).all())
    assert bool((retrieval_ranks(-items, items, places, backend=backend) == 59).all())


@each_backend("retrieval_ranks")
def test_retrieval_has_no_gradient(backend: str) -> None:
    query = whole(4, 3).float().requires_grad_()
    assert not retrieval_ranks(query, query, torch.arange(4), backend=backend).requires_grad


@each_backend("retrieval_ranks")
def test_autocast_rounds_no_feature(backend: str) -> None:
    """Rows that bfloat16 could not tell apart, of which none is nearer than the right one."""
    query = torch.ones(6, 1)
    gallery = 1.0 + 1e-4 * torch.arange(6.0)[:, None]
    for query_dtype in (torch.float32, torch.float16):  # a query that a model made under autocast
        with torch.autocast("cpu", torch.bfloat16):
            found = retrieval_ranks(query.to(query_dtype), gallery, torch.arange(6), backend=backend)
        assert found.tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(TypeError, match=r"^gallery must have query's dtype torch.float16, got torch.float32"):
        retrieval_ranks(query.half(), gallery, torch.arange(6), backend=backend)
