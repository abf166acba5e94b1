"""A batch of no images: results have the shapes that they have of any number of images."""

from __future__ import annotations

import pytest
import torch
from harness import each_backend

from mmkernels import match_tokens, merge_tokens, pruning, select_diverse, select_tokens, token_similarity, use_backend

X = torch.randn(0, 5, 8)


@each_backend("merge_tokens", interpreted=False)
@pytest.mark.parametrize("keep", [2, 0.4])
def test_a_batch_of_no_images(keep: int | float, backend: str) -> None:
    with use_backend(backend):
        merged, lengths, sizes, assignment = merge_tokens(X, 5, keep)
        assert (merged.shape, lengths, sizes.shape, assignment.shape) == ((0, 2, 8), 2, (0, 2), (0, 5))
        assert merge_tokens(X, [], keep)[1] == () and match_tokens(X, 5, keep)[1] == 2
        assert select_diverse(X, 5, keep).shape == (0, 2)
        assert token_similarity(X, 5, X[:, :3], 3).shape == (0, 5)
        for kept in (
            select_tokens(X, 5, keep, X[..., 0]),
            pruning.visionzip(X, 5, 1, 1, X[..., 0]),
            pruning.dart(X, 5, keep, pivots=1),
            pruning.divprune(X, 5, keep),
            pruning.cdpruner(X, 5, keep, X, X[:, :3], 3),
        ):
            assert (kept.x.shape, kept.lengths, kept.positions.shape) == ((0, 2, 8), 2, (0, 2))
        for call in (merge_tokens, match_tokens, select_diverse):
            with pytest.raises(ValueError, match=r"keep must be from . to 5 for image 0 of 5 tokens, got 9"):
                call(X, 5, 9)
