"""Late-interaction scores by sentence-transformers' names: the formula, masks, and its own functions and losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmkernels.integrations import sentence_transformers as ours

FUNCTIONS = list(ours.__all__)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Returns 3 queries and 3 groups of 2 documents, with padding after, between and before tokens."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
    documents = torch.randn(3, 2, 7, 5, generator=generator, dtype=torch.float64).to(dtype)
    queries_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    documents_mask = torch.rand(3, 2, 7, generator=generator) < 0.6
    documents_mask[0, 0] = torch.arange(7) < 3
    return {
        "queries_embeddings": queries, "documents_embeddings": documents, "queries_mask": queries_mask,
        "documents_mask": documents_mask,
    }  # fmt: skip


def formula(queries: Tensor, documents: Tensor, queries_mask: Tensor, documents_mask: Tensor) -> Tensor:
    """Returns ``[Q, D N]``."""
    products = torch.einsum("qid,njd->qnij", queries, documents.flatten(0, 1))
    hidden = ~documents_mask.flatten(0, 1)[None, :, None]
    best = products.masked_fill(hidden, -torch.inf).amax(-1) * queries_mask[:, None]
    return best.sum(-1).float()


@pytest.mark.parametrize("grouped", [True, False])
def test_against_the_formula(grouped: bool) -> None:
    given = inputs()
    if not grouped:
        given = {**given, "queries_mask": None, "documents_mask": None}
    leaves = [given[name].requires_grad_() for name in ("queries_embeddings", "documents_embeddings")]
    scores = ours.colbert_scores(**given)
    masks = [
        torch.ones(shape, dtype=torch.bool) if given[name] is None else given[name]
        for name, shape in (("queries_mask", (3, 4)), ("documents_mask", (3, 2, 7)))
    ]
    expected = formula(*leaves, *masks)
    assert scores.dtype == torch.float32 and scores.shape == (3, 6)
    torch.testing.assert_close(scores, expected)
    found = torch.autograd.grad(scores.square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves))


def test_pairs_groups_and_means() -> None:
    given = inputs()
    scores = ours.colbert_scores(**given)
    pairs = {
        **given,
        "documents_embeddings": given["documents_embeddings"][:, 1],
        "documents_mask": given["documents_mask"][:, 1],
    }
    torch.testing.assert_close(ours.colbert_scores_pairwise(**pairs), scores[:, 1::2].diagonal())
    own = torch.stack([scores[i, 2 * i : 2 * i + 2] for i in range(3)])
    torch.testing.assert_close(ours.colbert_kd_scores(**given), own)
    tokens = torch.tensor([4.0, 2.0, 1.0])
    torch.testing.assert_close(ours.mean_colbert_scores(**given), scores / tokens[:, None])
    torch.testing.assert_close(ours.mean_colbert_kd_scores(**given), own / tokens[:, None])
    torch.testing.assert_close(ours.mean_colbert_scores_pairwise(**pairs), scores[:, 1::2].diagonal() / tokens)


def test_a_document_without_tokens_comes_last() -> None:
    given = inputs()
    given["documents_mask"][1, 0] = False
    scores = ours.colbert_scores(**given)
    assert (scores[:, 2] == -1e9).all() and (scores.argsort(1)[:, 0] == 2).all()


def test_arrays_and_lists() -> None:
    given = inputs(torch.float32)
    queries, documents = given["queries_embeddings"], given["documents_embeddings"]
    expected = ours.colbert_scores(queries, documents)
    torch.testing.assert_close(ours.colbert_scores(queries.numpy(), list(documents)), expected)
    torch.testing.assert_close(ours.colbert_scores([np.asarray(x) for x in queries], documents), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries_embeddings": torch.zeros(3, 5)}, r"queries_embeddings must be \[Q, L, d\], got shape \(3, 5\)"),
        ({"documents_embeddings": torch.zeros(3, 7, 5)}, r"documents_embeddings must be \[D, N, L, d\], got shape"),
        (
            {"queries_mask": torch.ones(3, 3).bool()},
            r"queries_mask must be of the tokens' shape \(3, 4\), got \(3, 3\)",
        ),
        ({"documents_mask": torch.ones(3, 7).bool()}, r"documents_mask must be \[3, 2, 7\], one of each token, got"),
        ({"documents_mask": torch.ones(3, 2, 7)}, "documents_mask must be bool or integers, got torch.float32"),
    ],
)
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ours.colbert_scores(**{**inputs(torch.float32), **changed})


@pytest.mark.integration("sentence_transformers")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_beside_sentence_transformers(name: str) -> None:
    from sentence_transformers.multi_vector_encoder import scoring

    given = inputs(torch.float32)
    given["documents_mask"][2, 1] = False
    if name.endswith("pairwise"):
        given = {
            **given,
            "documents_embeddings": given["documents_embeddings"][:, 0],
            "documents_mask": given["documents_mask"][:, 0],
        }
    theirs = getattr(scoring, name)(**given)
    torch.testing.assert_close(getattr(ours, name)(**given), theirs)


class Embeddings(nn.Module):
    """Stands for a multi-vector model: a table of token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        tokens = nn.functional.normalize(self.table(features["input_ids"]), dim=-1)
        return {**features, "token_embeddings": tokens}


@pytest.mark.integration("sentence_transformers")
def test_in_a_loss_of_sentence_transformers() -> None:
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss

    generator = torch.Generator().manual_seed(0)
    columns = []
    for length in (4, 6, 9):  # questions, the documents that belong to them, and others
        ids = torch.randint(50, (5, length), generator=generator)
        mask = (torch.rand(5, length, generator=generator) < 0.7).long()
        mask[:, 0] = 1
        columns.append({"input_ids": ids, "attention_mask": mask})
    model, gradients = Embeddings(), []
    for options in ({}, {"similarity_fct": ours.colbert_scores}):
        model.zero_grad()
        loss = MultiVectorMultipleNegativesRankingLoss(model, scale=2.0, **options)  # type: ignore[arg-type]
        value = loss([dict(x) for x in columns])
        value.backward()
        gradients.append([value.detach(), model.table.weight.grad.clone()])  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients)
