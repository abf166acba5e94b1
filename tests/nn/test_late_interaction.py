"""`LateInteractionLoss` beside the formulas of PyLate, sentence-transformers and colpali-engine; ranks of tokens."""

from __future__ import annotations

from typing import Any

import late_interaction_on_ranks
import pytest
import ranks
import torch
import torch.nn.functional as F
from harness import generator
from late_interaction_on_ranks import naive_loss, naive_scores
from torch import Tensor

from mmkernels import retrieval_ranks
from mmkernels.nn import LateInteractionLoss
from mmkernels.nn.late_interaction import tokens_first
from mmkernels.ops.contrastive.max_sim.cases import tokens


def _masks(*shape: int, seed: int = 5) -> Tensor:
    """Masks with holes, one of them with nothing on the left."""
    mask = torch.rand(shape, generator=generator(seed)) < 0.7
    mask[..., -1] = True
    return mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.5, "label_smoothing": 0.1, "reduction": "sum"},
        {"mean_over_tokens": True, "scale": 20.0},
        {"query_weight": 0.5, "scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("hard", [0, 2])
def test_beside_the_formula(options: dict[str, Any], hard: int) -> None:
    """In float64, gradients too, with masks that have holes."""
    g = generator()
    query = tokens(g, 5, 6, 8).requires_grad_()
    shape = (5, 1 + hard) if hard else (5,)
    document = tokens(g, *shape, 9, 8).requires_grad_()
    masks: dict[str, Any] = {"query_mask": _masks(5, 6), "document_mask": _masks(*shape, 9, seed=6)}
    loss = LateInteractionLoss(**options)(query, document, **masks)
    want = naive_loss(query, document, **masks, **options)
    torch.testing.assert_close(loss, want)
    for x, y in zip(*(torch.autograd.grad(z, (query, document)) for z in (loss, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_masks_become_lengths() -> None:
    x = torch.arange(2 * 4 * 1).reshape(2, 4, 1).float()
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    moved, lengths = tokens_first("query", x, mask)
    assert lengths is not None and lengths.tolist() == [2, 2]
    assert moved[..., 0].tolist() == [[1, 3, 0, 2], [4, 5, 6, 7]]
    same, lengths = tokens_first("query", x, mask[1:].expand(2, 4))
    assert same is x, "padding on the right is left where it is"
    assert tokens_first("query", x, None) == (x, None)


_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    ({"query_weight": 1.5}, ValueError, "query_weight must be a number from 0 to 1, got 1.5"),
    ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum, got 'none'"),
    ({"mean_over_tokens": 1}, TypeError, "mean_over_tokens must be a bool, got int"),
]
_BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"document": torch.ones(3, 5, 8)}, ValueError, r"document must be \[N, Ld, d\] or \[N, K, Ld, d\] with"),
    ({"document": torch.ones(2, 0, 5, 8)}, ValueError, r"document must be .* with K >= 1, got shape \(2, 0, 5, 8\)"),
    ({"query": torch.ones(4, 8)}, ValueError, r"query must be \[N, Lq, d\], got shape \(4, 8\)"),
    ({"document_mask": torch.ones(2, 5, device="meta").bool()}, ValueError, "document_mask must be on .* got meta"),
    ({"document": None}, TypeError, "document must be a tensor, got NoneType"),
    ({"query_mask": torch.ones(2, 4)}, TypeError, "query_mask must be bool or integers, got torch.float32"),
    ({"query_mask": torch.ones(2, 3).bool()}, ValueError, r"tokens' shape \(2, 4\), got \(2, 3\)"),
    ({"document": torch.ones(2, 3, 5, 8), "document_mask": torch.ones(2, 5)}, ValueError, r"must be \[N, K, Ld\]"),
]


@pytest.mark.parametrize(("bad", "error", "message"), _BAD)
def test_bad_options(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LateInteractionLoss(**bad)


@pytest.mark.parametrize(("bad", "error", "message"), _BAD_CALLS, ids=[message[:30] for *_, message in _BAD_CALLS])
def test_bad_calls(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"query": torch.ones(2, 4, 8), "document": torch.ones(2, 5, 8)} | bad
    with pytest.raises(error, match=message):
        LateInteractionLoss()(given.pop("query"), given.pop("document"), **given)


# Over ranks.


@pytest.mark.parametrize("sizes", [[3, 2], [3, 0, 4]], ids=str)
def test_ranks_are_one_process(sizes: list[int]) -> None:
    """Loss, and gradients after DDP's mean, of every share of queries, and of documents of other lengths."""
    ranks.run(len(sizes), late_interaction_on_ranks.as_one_process, sizes)


def test_a_bad_rank_is_told() -> None:
    first, second = ranks.run(2, late_interaction_on_ranks.one_is_bad)
    assert first.startswith("ValueError: document must be [N, Ld, d]")
    assert second.startswith("ValueError: max_sim, forward: rank 0 of the group has bad input")


def test_options_are_those_of_all_ranks() -> None:
    found = ranks.run(2, late_interaction_on_ranks.options_differ)
    for name, errors in zip(
        ("query_weight", "scale", "the number of documents"), zip(*found, strict=True), strict=True
    ):
        assert all(error.startswith(f"ValueError: max_sim, forward: {name}") for error in errors), errors


# Ranks of what is retrieved.


def test_ranks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generator(7)
    query, gallery = tokens(g, 6, 4, 8), tokens(g, 9, 7, 8)
    gallery[5] = gallery[2]  # of equal scores the lower index stands first
    target = torch.tensor([0, 5, 2, 8, 3, 5])
    lengths: dict[str, Any] = {
        "query_lengths": torch.tensor([4, 2, 4, 1, 3, 4]),
        "gallery_lengths": torch.tensor([7, 3, 7, 1, 2, 7, 7, 5, 6]),
    }
    masks = [torch.arange(n) < x[:, None] for n, x in zip((4, 7), lengths.values(), strict=True)]
    order = naive_scores(query, gallery, *masks).argsort(dim=1, descending=True, stable=True)
    want = (order == target[:, None]).int().argmax(1)
    assert torch.equal(retrieval_ranks(query, gallery, target, **lengths), want)
    monkeypatch.setattr("mmkernels.ops.contrastive.retrieval_ranks.tokens._SCORE_BYTES", 4 * 9 * 2)
    assert torch.equal(retrieval_ranks(query, gallery, target, **lengths), want)
    assert retrieval_ranks(query[:0], gallery, target[:0]).shape == (0,)


@pytest.mark.parametrize("sizes", [[(3, 2), (2, 7)], [(1, 0), (0, 5), (4, 4)]], ids=str)
def test_ranks_of_tokens_over_ranks(sizes: list[tuple[int, int]]) -> None:
    """Each rank's queries among the items of all."""
    ranks.run(len(sizes), late_interaction_on_ranks.ranks_as_one_process, sizes)


def test_ranks_without_any_item() -> None:
    for error in ranks.run(2, late_interaction_on_ranks.no_gallery):
        assert error == "ValueError: gallery must have an item at least on one rank of the group, got none"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target": torch.tensor([0, 9])}, "target must be from 0 to 2, got 0 to 9"),
        ({"gallery": torch.ones(0, 3, 8)}, "gallery must have an item at least, got none"),
        ({"query": torch.ones(2, 8), "gallery": torch.ones(3, 8), "query_lengths": torch.ones(2).long()},
         r"query_lengths must be None where query is \[N, d\]"),
        ({"gallery": torch.ones(3, 5, 7)}, r"gallery must be \[Nd, Ld, 8\]"),
        ({"gallery_lengths": torch.tensor([1, 2, 6])}, "gallery_lengths must be from 0 to 5, got 1 to 6"),
        ({"target": torch.ones(2, device="meta").long()}, "target must be on query's device cpu, got meta"),
        ({"query": torch.ones(0, 4, 8), "target": torch.ones(0).long(), "backend": "none"}, "backend must be one of"),
        ({"gallery": torch.ones(3, 8)}, r"query must be \[N, d\] where gallery is \[M, d\]"),
    ],
)  # fmt: skip
def test_bad_input_of_ranks(bad: dict[str, Any], message: str) -> None:
    given = {"query": torch.ones(2, 4, 8), "gallery": torch.ones(3, 5, 8), "target": torch.tensor([0, 1])} | bad
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(**given)


def test_normalised_features_are_what_it_is_for() -> None:
    """Training on it raises the scores of what belongs together above those of the others."""
    g = generator(8)
    page = F.normalize(torch.randn(6, 12, 8, generator=g), dim=-1)
    question = torch.randn(6, 4, 8, generator=g).requires_grad_()
    optimizer, loss = torch.optim.Adam([question], 0.1), LateInteractionLoss()
    for _ in range(12):
        optimizer.zero_grad()
        loss(F.normalize(question, dim=-1), page).backward()
        optimizer.step()
    found = retrieval_ranks(F.normalize(question.detach(), dim=-1), page, torch.arange(6))
    assert not found.any()
