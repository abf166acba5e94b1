"""Recall in both directions against a sort of all scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmkernels.evaluation import retrieval_recall

OWNERS = {
    "one text an image": None,
    "several": torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7]),
    "shuffled, one image without": torch.tensor([5, 0, 3, 2, 0, 7, 6, 3, 2, 5, 1, 0]),
}


def features(owner: Tensor | None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    image = torch.randn(8, 5, dtype=torch.float64)
    text = torch.randn(8 if owner is None else len(owner), 5, dtype=torch.float64)
    return image.to(dtype), (text + 0.7 * (image if owner is None else image[owner])).to(dtype)


def first_right(scores: Tensor, right: Tensor) -> Tensor:
    """Returns of each row the place of its first right column, in a stable descending sort."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return right.gather(1, order).int().argmax(1)


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_a_sort_of_all_scores(owner: Tensor | None, dtype: torch.dtype) -> None:
    image, text = features(owner, dtype)
    found = retrieval_recall(image, text, owner, ks=(1, 2, 5))
    scores = image.double() @ text.double().T
    owners = torch.arange(8) if owner is None else owner
    right = owners == torch.arange(8)[:, None]
    asked = right.any(1)
    torch.testing.assert_close(found.image_ranks, first_right(scores, right)[asked])
    torch.testing.assert_close(found.text_ranks, first_right(scores.T, right.T))
    for k in (1, 2, 5):
        assert found.image_to_text[k] == pytest.approx((found.image_ranks < k).double().mean().item())
        assert found.text_to_image[k] == pytest.approx((found.text_ranks < k).double().mean().item())


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("strip", [1, 2**20])
def test_the_best_of_several_queries_counts(owner: Tensor | None, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In strips of one image, and in a single one."""
    monkeypatch.setattr("mmkernels.evaluation.retrieval._STRIP_BYTES", strip)
    own, text = features(owner)
    image = torch.stack([own - 1, own, own.roll(1, 0)], dim=1)
    text[-1] = text[0]  # equal scores, which count in their order
    found = retrieval_recall(image, text, owner)
    scores = (image @ text.T).amax(1)
    right = (torch.arange(8) if owner is None else owner) == torch.arange(8)[:, None]
    torch.testing.assert_close(found.image_ranks, first_right(scores, right)[right.any(1)])
    torch.testing.assert_close(found.text_ranks, first_right(scores.T, right.T))


def test_several_queries_that_are_nan() -> None:
    image, text = torch.eye(3)[:, None].repeat(1, 2, 1), torch.eye(3)
    image[0, 1, 0] = math.nan
    found = retrieval_recall(image, text)
    assert found.image_ranks.tolist() == found.text_ranks.tolist() == [3, 0, 0]
    with pytest.raises(ValueError, match="backend must be None for several queries an image, got 'reference'"):
        retrieval_recall(image, text, backend="reference")


def test_a_model_that_tells_nothing_apart_gets_what_the_order_gives() -> None:
    image, text = torch.ones(4, 3), torch.ones(8, 3)
    found = retrieval_recall(image, text, torch.arange(8) // 2, ks=(1, 8))
    assert found.image_ranks.tolist() == [0, 2, 4, 6]
    assert found.text_ranks.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.image_to_text == {1: 0.25, 8: 1.0}


def test_nan_is_never_found() -> None:
    image, text = torch.eye(3), torch.eye(3).repeat_interleave(2, 0)
    image[0, 0] = text[2, 1] = math.nan  # all of image 0, and one of the two texts of image 1
    found = retrieval_recall(image, text, torch.arange(6) // 2, ks=(1, 100))
    assert found.image_ranks.tolist() == [6, 0, 0]
    assert found.text_ranks.tolist() == [3, 3, 3, 0, 0, 0]
    assert found.image_to_text[100] == pytest.approx(2 / 3)
    assert found.text_to_image[100] == pytest.approx(1 / 2)


def test_more_texts_than_are_scored_at_once() -> None:
    image = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    owner = torch.randint(50, (4500,))
    assert retrieval_recall(image, image[owner], owner, ks=[1]).text_to_image == {1: 1.0}


def test_no_gradient_is_kept() -> None:
    image, text = (x.requires_grad_() for x in features(None))
    assert not retrieval_recall(image, text).text_ranks.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"image": [[1.0]]}, TypeError, "image must be a tensor, got list"),
        ({"image": torch.ones(8, 5, dtype=torch.int64)}, TypeError, "image must be float16, bfloat16, float32 or"),
        ({"image": torch.ones(0, 5)}, ValueError, "image must be .* at least one row and channel, got shape .0, 5"),
        ({"text": torch.ones(12)}, ValueError, "text must be .* got shape .12,"),
        ({"text": torch.ones(12, 4)}, ValueError, r"text must be as image \[M, 5\] .* got \[M, 4\]"),
        ({"text": torch.ones(12, 5).double()}, ValueError, "text must be as image .* got .* torch.float64"),
        ({"text_image": None}, ValueError, "text must be 8 rows as image without text_image, got 12"),
        ({"text_image": torch.zeros(12)}, TypeError, "text_image must be int64, got torch.float32"),
        ({"text_image": torch.zeros(11).long()}, ValueError, r"text_image must be \[12\] as text, got shape \(11,\)"),
        ({"text_image": torch.full((12,), 8)}, ValueError, "text_image must be from 0 to 7, got 8"),
        ({"ks": ()}, ValueError, "ks must be at least one of integers, got none"),
        ({"ks": (0,)}, ValueError, "ks must be >= 1, got 0"),
        ({"ks": (1.0,)}, TypeError, "ks must be an integer, got float"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, object], error: type[Exception], match: str) -> None:
    arguments = {"image": torch.ones(8, 5), "text": torch.ones(12, 5), "text_image": torch.zeros(12).long()} | change
    with pytest.raises(error, match=match):
        retrieval_recall(**arguments)  # type: ignore[arg-type]
