"""Image-text matching: how hard negatives are drawn, and the loss against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from objective_formulas import check_against
from torch import Generator, Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels.objectives import image_text_matching, image_text_matching_loss, matching_pairs


def features(count: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(count, dim, generator=generator), dim=1).to(dtype) for _ in range(2))
    return image, text


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("strip_bytes", [2**23, 1])  # all rows at once, and row by row
@pytest.mark.parametrize("ids", [None, torch.tensor([3, 1, 3, 2, 2])])
def test_negatives_are_drawn_with_the_probability_of_their_score(
    ids: Tensor | None, strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_text_matching, "_STRIP_BYTES", strip_bytes)
    image, text = features(5)
    generator, draws = Generator().manual_seed(1), 500
    counts = torch.zeros(2, 5, 5)
    for _ in range(draws):
        pairs = matching_pairs(image, text, 2.0, ids=ids, generator=generator)
        counts[0].view(-1)[pairs.images[5:10] * 5 + pairs.texts[5:10]] += 1
        counts[1].view(-1)[pairs.texts[10:] * 5 + pairs.images[10:]] += 1
    same = torch.eye(5, dtype=torch.bool) if ids is None else ids[:, None] == ids
    scores = (2.0 * image @ text.T).masked_fill(same, -torch.inf)
    for found, expected in zip(counts / draws, (scores.softmax(1), scores.T.softmax(1)), strict=True):
        assert not found[same].any()
        assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all())


def test_order_of_pairs_and_reproducibility() -> None:
    image, text = features(50, dtype=torch.bfloat16)
    draw = [matching_pairs(image, text, 5.0, generator=Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    own = torch.arange(50)
    for pairs in draw:
        assert torch.equal(pairs.images[:100], own.repeat(2)) and torch.equal(pairs.texts[:50], own)
        assert torch.equal(pairs.texts[100:], own)
        assert torch.equal(pairs.labels, torch.tensor([1, 0, 0]).repeat_interleave(50))
        assert not (pairs.images == pairs.texts)[50:].any()
    assert all(torch.equal(a, b) for a, b in zip(draw[0], draw[1], strict=True))
    assert not torch.equal(draw[0].texts, draw[2].texts)


def test_sharp_scores_always_give_the_hardest() -> None:
    image, text = features(20, seed=2)
    scores = (image @ text.T).fill_diagonal_(-torch.inf)
    pairs = matching_pairs(image, text, torch.tensor(1e6, requires_grad=True))
    assert torch.equal(pairs.texts[20:40], scores.argmax(1)) and torch.equal(pairs.images[40:], scores.argmax(0))


def test_the_score_of_a_pair_is_that_of_its_best_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `info_nce`; draws are those of the scores by themselves, whatever the strips."""
    queries, text = torch.randn(9, 3, 6, generator=Generator().manual_seed(4)), features(9)[1]
    scores = torch.einsum("nqd,md->nqm", queries, text).amax(1).fill_diagonal_(-torch.inf)
    pairs = matching_pairs(queries, text, 1e6)
    assert torch.equal(pairs.texts[9:18], scores.argmax(1)) and torch.equal(pairs.images[18:], scores.argmax(0))
    one = matching_pairs(queries[:, :1], text, 2.0, generator=Generator().manual_seed(0))
    plain = matching_pairs(queries[:, 0], text, 2.0, generator=Generator().manual_seed(0))
    assert all(torch.equal(x, y) for x, y in zip(one, plain, strict=True))
    monkeypatch.setattr(image_text_matching, "_STRIP_BYTES", 4 * 9 * 3 * 2)  # two images at once
    with Largest() as largest:
        strips = matching_pairs(queries, text, 1e6)
    assert all(torch.equal(x, y) for x, y in zip(strips, pairs, strict=True)) and largest.elements <= 9 * 3 * 2
    queries[2, 1] = torch.nan
    assert 2 not in matching_pairs(queries, text, 1.0).images[18:].tolist()


def test_a_row_without_a_negative_is_ignored() -> None:
    alone = matching_pairs(*features(1), 1.0)
    assert alone.labels.tolist() == [1, -100, -100] and alone.images.tolist() == alone.texts.tolist() == [0, 0, 0]
    alike = matching_pairs(*features(3), 1.0, ids=torch.zeros(3, dtype=torch.int32))
    assert alike.labels.tolist() == [1] * 3 + [-100] * 6
    image, text = features(4)
    image[2] = torch.nan
    pairs = matching_pairs(image, text, 1.0)
    assert pairs.labels.tolist() == [1] * 4 + [0, 0, -100, 0] + [0] * 4  # image 2 has no score
    assert 2 not in pairs.images[8:].tolist() and pairs.texts.min() >= 0


def test_scores_of_a_large_batch_are_never_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_text_matching, "_STRIP_BYTES", 4 * 7 * 100)
    with Largest() as largest:
        matching_pairs(*features(100), 1.0)
    assert 100 <= largest.elements <= 7 * 100


def test_loss_against_the_formula() -> None:
    generator = Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((12, 6), (2, 6), (2,)))
    labels = torch.tensor([1, 1, 1, 1, 0, 0, -100, 0, 0, -100, 0, 0])

    def formula(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = hidden @ weight.T + bias
        margin = z[:, 1] - z[:, 0]
        return -torch.where(labels == 1, margin, -margin)[labels >= 0].sigmoid().log().mean()

    check_against(lambda h, w, b: image_text_matching_loss(h, w, labels, bias=b), formula, hidden, weight, bias)
    low = image_text_matching_loss(hidden.bfloat16(), weight.bfloat16(), labels)
    assert low.dtype == torch.float32
    assert image_text_matching_loss(hidden, weight, torch.full((12,), -100)).isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": features(5)[1]}, ValueError, r"and text \[N, d\], got shapes \(4, 6\) and \(5, 6\)"),
        (
            {"image": torch.randn(4, 3, 2, 6)},
            ValueError,
            r"image must be .* \[N, Q, d\] .*got shape \(4, 3, 2, 6",
        ),
        ({"image": torch.randn(3, 2, 6)}, ValueError, r"and text \[N, d\], got shapes \(3, 2, 6\) and \(4, 6\)"),
        ({"text": features(4)[1].double()}, TypeError, "text must have image's dtype"),
        ({"image": torch.ones(4, 6, dtype=torch.long)}, TypeError, "image must be float16"),
        ({"ids": torch.arange(3)}, ValueError, r"ids must be \[4\], one for each pair, got shape \(3,\)"),
        ({"ids": torch.ones(4)}, TypeError, "ids must be integers, got torch.float32"),
        ({"logit_scale": "100"}, TypeError, "logit_scale must be a tensor of one element or a number, got str"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    image, text = features(4)
    with pytest.raises(error, match=message):
        matching_pairs(**{"image": image, "text": text, "logit_scale": 1.0} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(6)}, ValueError, r"hidden must be \[P, d\], got shape \(6,\)"),
        ({"weight": torch.randn(3, 6)}, ValueError, r"weight must be \[2, 6\], got shape \(3, 6\)"),
        ({"labels": torch.ones(3).long()}, ValueError, r"labels must be \[4\], got shape \(3,\)"),
        ({"labels": torch.ones(4)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.tensor([0, 1, 2, -100])}, ValueError, "labels must be from 0 .* to 1, got 0 to 2"),
        ({"weight": torch.randn(2, 6).double()}, TypeError, "weight must have hidden's dtype"),
        ({"bias": torch.randn(3)}, ValueError, r"bias must be \[2\], got shape \(3,\)"),
    ],
)
def test_bad_input_of_the_loss(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"hidden": torch.randn(4, 6), "weight": torch.randn(2, 6), "labels": torch.ones(4).long()}
    with pytest.raises(error, match=message):
        image_text_matching_loss(**given | change)
