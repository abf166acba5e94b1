"""Late-interaction scores by the names of sentence-transformers 6, over `max_sim`, which stores no products of tokens.

A function of this module goes in as the ``similarity_fct`` of sentence-transformers' multi-vector losses; nothing else
of a training script changes. sentence-transformers need not be installed: no function imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from mmkernels.nn.late_interaction import tokens_first
from mmkernels.ops.contrastive.max_sim import max_sim

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "colbert_kd_scores",
    "colbert_scores",
    "colbert_scores_pairwise",
    "mean_colbert_kd_scores",
    "mean_colbert_scores",
    "mean_colbert_scores_pairwise",
]

Tokens = Union[Tensor, "np.ndarray", list[Tensor], list["np.ndarray"]]

_EMPTY = -1e9
"""The score of a document without tokens, as in sentence-transformers: below that of every other one."""


def colbert_scores(
    queries_embeddings: Tokens,
    documents_embeddings: Tokens,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """Returns the score of each query with each document, float32 ``[Q, D N]``, as sentence-transformers' function.

    Column ``j N + n`` is document n of group j. Differentiable, see `mmkernels.max_sim`.

    Args:
        queries_embeddings: ``[Q, Lq, d]``.
        documents_embeddings: ``[D, N, Ld, d]``, in groups of N: the document that belongs to query j, then others.
        queries_mask: bool or whole numbers ``[Q, Lq]``, of the tokens that count; None: all.
        documents_mask: ``[D, N, Ld]``, the same. A document without tokens has the score -1e9.
        chunk_elements: accepted without effect: memory is always that of the scores.
        length_normalize: divide each score by the number of its query's tokens.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Example:
        >>> import torch
        >>> from mmkernels.integrations.sentence_transformers import colbert_scores
        >>> queries, documents = torch.randn(4, 8, 16), torch.randn(4, 2, 20, 16)
        >>> colbert_scores(queries, documents).shape
        torch.Size([4, 8])
        >>> # MultiVectorMultipleNegativesRankingLoss(model, similarity_fct=colbert_scores)
    """
    documents = _tensor("documents_embeddings", documents_embeddings, 4)
    mask = _grouped(documents_mask, documents)
    if mask is not None:
        mask = mask.flatten(0, 1)
    return _scores(queries_embeddings, queries_mask, documents.flatten(0, 1), mask, False, length_normalize)


def colbert_scores_pairwise(
    queries_embeddings: Tokens,
    documents_embeddings: Tokens,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """Returns the score of each query with the document of its place, float32 ``[N]``; else as `colbert_scores`.

    Args:
        documents_embeddings: ``[N, Ld, d]``. documents_mask: ``[N, Ld]``.
    """
    documents = _tensor("documents_embeddings", documents_embeddings, 3)
    return _scores(queries_embeddings, queries_mask, documents, documents_mask, True, length_normalize)


def colbert_kd_scores(
    queries_embeddings: Tokens,
    documents_embeddings: Tokens,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """Returns the score of each query with each document of its group, float32 ``[Q, N]``; else as `colbert_scores`."""
    documents = _tensor("documents_embeddings", documents_embeddings, 4)
    mask = _grouped(documents_mask, documents)
    groups = zip(documents.unbind(1), [None] * documents.shape[1] if mask is None else mask.unbind(1))
    columns = [
        _scores(queries_embeddings, queries_mask, group, shown, True, length_normalize) for group, shown in groups
    ]
    return torch.stack(columns, dim=1)


def _averaged(scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns scores divided by the number of the query's tokens, by sentence-transformers' name for them."""

    def averaged(
        queries_embeddings: Tokens,
        documents_embeddings: Tokens,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
        chunk_elements: int | None = None,
        length_normalize: bool = True,
    ) -> Tensor:
        return scores(
            queries_embeddings, documents_embeddings, queries_mask, documents_mask, chunk_elements, length_normalize
        )

    averaged.__name__ = averaged.__qualname__ = f"mean_{scores.__name__}"  # what a loss keeps in its configuration
    averaged.__doc__ = f"Returns `{scores.__name__}` divided by the number of the query's tokens."
    return averaged


mean_colbert_scores = _averaged(colbert_scores)
mean_colbert_scores_pairwise = _averaged(colbert_scores_pairwise)
mean_colbert_kd_scores = _averaged(colbert_kd_scores)


def _scores(
    queries: Tokens,
    queries_mask: Tensor | None,
    documents: Tensor,
    documents_mask: Tensor | None,
    paired: bool,
    length_normalize: bool,
) -> Tensor:
    """Returns ``[Q, D]``, or ``[N]`` of pairs; documents: ``[D, Ld, d]``."""
    query = _tensor("queries_embeddings", queries, 3)
    query, query_lengths = tokens_first("queries", query, _mask(queries_mask, query))
    document, document_lengths = tokens_first("documents", documents, _mask(documents_mask, documents))
    scores = max_sim(
        query, document, query_lengths=query_lengths, document_lengths=document_lengths, paired=paired
    ).float()
    if document_lengths is not None:
        scores = scores.masked_fill(document_lengths == 0, _EMPTY)
    if not length_normalize:
        return scores
    if query_lengths is None:
        return scores / query.shape[1]
    tokens = query_lengths.clamp(min=1).to(scores.dtype)
    return scores / (tokens if paired else tokens[:, None])


def _tensor(name: str, tokens: Tokens, dims: int) -> Tensor:
    """Returns tokens as a tensor."""
    if isinstance(tokens, list):
        tokens = torch.stack([torch.as_tensor(x) for x in tokens])
    found = torch.as_tensor(tokens)
    if found.dim() != dims:
        shape = "[Q, L, d]" if dims == 3 else "[D, N, L, d]"
        raise ValueError(f"{name} must be {shape}, got shape {tuple(found.shape)}")
    return found


def _mask(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Returns a mask on the tokens' device."""
    return None if mask is None else torch.as_tensor(mask).to(tokens.device)


def _grouped(mask: Tensor | None, documents: Tensor) -> Tensor | None:
    """Returns the mask of documents in groups ``[D, N, Ld]``."""
    if mask is not None and mask.shape != documents.shape[:3]:
        raise ValueError(
            f"documents_mask must be {list(documents.shape[:3])}, one of each token, got shape {tuple(mask.shape)}"
        )
    return mask
