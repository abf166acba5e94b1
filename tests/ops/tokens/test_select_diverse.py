"""Diverse selection: by hand, beside the papers' formulas, as its definition says at any size, and wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import select_diverse


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=1)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 2], [1, 0, 0]])
    # At first all tokens add 1, so token 0. Then of [1, 1, 0] half is new, of tokens 2 and 3 all.
    assert select_diverse(x, [5], 4, backend=backend).tolist() == [0, 2, 3, 1]
    # The nearest neighbours of tokens 0 to 4 are at 0, 1 - 1/sqrt(2), the same, 1, 0: so token 3.
    assert select_diverse(x, [5], 4, method="distance", backend=backend).tolist() == [3, 0, 2, 1]
    # A token that counts twice is worth it: of token 1, 4 * 1/2 is new beside token 0.
    quality = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])
    assert select_diverse(x, [5], 3, quality=quality, backend=backend).tolist() == [0, 1, 3]


@given(
    tokens=st.integers(1, 60), keep=st.integers(0, 60), dim=st.integers(1, 40), seed=st.integers(0, 10**6),
    method=st.sampled_from(["determinant", "distance"]),
)  # fmt: skip
def test_each_choice_is_the_best(tokens: int, keep: int, dim: int, seed: int, method: str) -> None:
    """In float64, from the tokens that were chosen before it: within rounding, no other token would add more."""
    x, keep = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed)), min(keep, tokens)
    found = select_diverse(x, [tokens], keep, method=method)
    assert len(set(found.tolist())) == keep and all(0 <= place < tokens for place in found.tolist())
    rows = unit(x)
    for step in range(1, keep):
        before = rows[found[:step]]
        if method == "distance":
            adds = (1 - rows @ before.mT).amin(1)
        else:
            adds = (rows - rows @ torch.linalg.pinv(before) @ before).norm(dim=1) ** 2
        adds[found[:step]] = 0
        assert adds[found[step]] >= adds.max() - 2e-5


def test_images_are_apart() -> None:
    x = torch.randn(3, 20, 8)
    each = torch.stack([select_diverse(image, [20], 5) for image in x])
    assert torch.equal(select_diverse(x, 20, 5), each)
    packed = select_diverse(x.flatten(0, 1), [20, 20, 20], [5, 5, 5])
    assert torch.equal(packed.view(3, 5), each + 20 * torch.arange(3)[:, None])
    assert select_diverse(x[:0], 20, 5).shape == (0, 5)
    strided = torch.randn(8, 60).T
    assert torch.equal(select_diverse(strided, [60], 9), select_diverse(strided.contiguous(), [60], 9))


@pytest.mark.parametrize("method", ["determinant", "distance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_size_of_values(dtype: torch.dtype, method: str) -> None:
    """Only directions count: no square overflows or vanishes."""
    x = torch.randn(40, 16).to(dtype) * torch.tensor([1e-15, 1.0, 1e15, 1e25]).repeat(10)[:, None].to(dtype)
    expected = select_diverse(x.double(), [40], 12, method=method, backend="reference")
    assert torch.equal(select_diverse(x, [40], 12, method=method), expected)


def test_no_similarity_is_kept() -> None:
    """The CPU keeps what it has chosen, and a few numbers a token."""
    x = torch.randn(20_000, 8)
    assert len(select_diverse(x, [20_000], 8, method="distance")) == 8  # all similarities would take 1.6 GB


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(6, 4, dtype=torch.int64)}, TypeError, "x must be float16, bfloat16, float32 or float64"),
        ({"x": torch.ones(6)}, ValueError, r"x must be \[tokens, C\] or \[images, tokens, C\], got shape \(6,\)"),
        ({"x": torch.ones(6, 0)}, ValueError, "x must have channels"),
        ({"lengths": [5]}, ValueError, "lengths must match x's 6 tokens, got 5 in 1 images"),
        ({"lengths": [-1, 7]}, ValueError, "lengths must be 0 or more, got -1"),
        ({"lengths": [2.0, 4.0]}, TypeError, "lengths must be integers, the tokens of each image, got float"),
        ({"lengths": "6"}, TypeError, "lengths must be integers, the tokens of each image, got str"),
        ({"lengths": torch.tensor([6.0])}, TypeError, "lengths must be integers, .*, got torch.float32"),
        ({"keep": 7}, ValueError, "keep must be from 0 to 6 for image 0 of 6 tokens, got 7"),
        ({"keep": -1}, ValueError, "keep must be 0 or more, got -1"),
        ({"keep": [1, 2]}, ValueError, "keep must be for 1 images, got 2"),
        ({"keep": True}, TypeError, "keep must be a number of tokens, .*, got bool"),
        ({"method": "best"}, ValueError, "method must be determinant or distance, got 'best'"),
        ({"quality": torch.ones(5)}, ValueError, r"quality must be \[6\], one for each token, got shape \(5,\)"),
        ({"quality": torch.ones(6, dtype=torch.int64)}, TypeError, "quality must be float16, bfloat16"),
        ({"quality": torch.ones(6), "method": "distance"}, ValueError, "quality must be None for method distance"),
        ({"quality": torch.ones(6, device="meta")}, ValueError, "quality must be on x's device cpu, got meta"),
    ],
)  # fmt: skip
def test_wrong_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call: dict[str, Any] = {"x": torch.ones(6, 4), "lengths": [6], "keep": 2} | change
    with pytest.raises(error, match=match):
        select_diverse(**call)


def test_wrong_batches() -> None:
    x = torch.ones(2, 6, 4)
    with pytest.raises(ValueError, match="keep must be the same for all images"):
        select_diverse(x, 6, [1, 2])
    with pytest.raises(ValueError, match="lengths must match x's 6 tokens an image, got 5 in 0"):
        select_diverse(x, 5, 2)
    with pytest.raises(ValueError, match="lengths must be for x's 2 images, got 3"):
        select_diverse(x, [6, 6, 6], 2)
