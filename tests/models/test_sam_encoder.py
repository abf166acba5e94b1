"""SAM's encoder: attention with relative positions against the formula, and what it keeps in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import distance
from torch import Tensor

from mmkernels import SpanMask, use_backend
from mmkernels.models.blocks.sam_encoder import RelativeAttention, SamBlock, SamEncoder, SamSizes

SIZES = SamSizes(24, 2, 2, 40, image_size=32, patch_size=4, window=3, global_layers=(1,), channels=8)


def formula(attention: RelativeAttention, projected: Tensor) -> Tensor:
    """Returns what `attend` does, from a table of all scores."""
    side, heads = attention.side, attention.num_heads
    query, key, value = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    place = torch.arange(side * side)
    apart = lambda at: at[:, None] - at + side - 1
    row, column = attention.row_positions[apart(place // side)], attention.column_positions[apart(place % side)]
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + torch.einsum("whqd,qkd->whqk", query, row + column)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("side", [1, 2, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_relative_attention(side: int, grad: bool) -> None:
    """With gradients of the input and of the positions, and without."""
    torch.manual_seed(side)
    attention = RelativeAttention(24, 2, side).double()
    projected = torch.randn(3, side * side, 72, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out, expected = attention.attend(projected), formula(attention, projected)
    assert distance(out, expected) < 1e-14
    if grad:
        wanted = [projected, attention.row_positions, attention.column_positions]
        weight = torch.randn_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True
        ):
            assert float((ours - theirs).norm()) <= 1e-13 * max(1.0, float(theirs.norm()))


def test_the_whole_layer_and_a_mask() -> None:
    torch.manual_seed(0)
    attention, x = RelativeAttention(24, 2, 3).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    expected = attention.out_proj(formula(attention, attention.project(x)))
    assert distance(attention(x), expected) < 1e-14
    hidden = x.clone()
    hidden[:, 5:] = 0  # what nobody sees counts for nothing
    mask = SpanMask.key_padding([5, 5])
    assert torch.equal(attention(x, mask)[:, :5], attention(hidden, mask)[:, :5])
    assert distance(attention(x, mask), expected) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(24, 2, 4).to(dtype)
    projected = torch.randn(2, 16, 72).to(dtype)
    expected = formula(attention.double(), projected.double())
    out = attention.to(dtype).attend(projected)
    assert out.dtype == dtype and distance(out.double(), expected) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_a_window_of_the_whole_image_is_a_global_layer() -> None:
    windowed, whole = SamBlock(SIZES, 8), SamBlock(SIZES, None)
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 8, 8, 24)
    assert torch.equal(windowed(x), whole(x))


@pytest.mark.parametrize("bias", [True, False])
def test_windows(bias: bool) -> None:
    """Each by itself; the last ones are filled with patches of zeros, whose keys and values are the biases."""
    torch.manual_seed(0)
    block = SamBlock(SIZES._replace(bias=bias), 3).double()
    x = torch.randn(2, 8, 8, 24, dtype=torch.float64)
    normed = torch.zeros(2, 9, 9, 24, dtype=torch.float64)
    normed[:, :8, :8] = block.attention_norm(x)
    expected = torch.zeros_like(normed)
    for image in range(2):
        for row in range(0, 9, 3):
            for column in range(0, 9, 3):
                window = normed[image, row : row + 3, column : column + 3].reshape(1, 9, 24)
                attended = block.attention.out_proj(formula(block.attention, block.attention.project(window)))
                expected[image, row : row + 3, column : column + 3] = attended.view(3, 3, 24)
    y = x + expected[:, :8, :8]
    assert distance(block(x), y + block.mlp(block.mlp_norm(y))) < 1e-14


def test_backends() -> None:
    """The naive formula runs by the same code."""
    torch.manual_seed(0)
    encoder, x = SamEncoder(SIZES), torch.randn(2, 3, 32, 32)
    fused = encoder(x, 0)
    with use_backend("reference"):
        for ours, naive in zip(fused, encoder(x, 0), strict=True):
            assert distance(ours, naive) < 1e-5


def test_dropout_is_for_training() -> None:
    block, x = SamBlock(SIZES._replace(dropout=0.5), 3), torch.randn(1, 8, 8, 24)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_no_table_of_scores_is_kept() -> None:
    """Nor of their positions, in training: the largest tensor kept is that of the longer queries."""
    side = 16
    attention = RelativeAttention(24, 2, side)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention.attend(torch.randn(1, side * side, 72, requires_grad=True))
    assert max(kept) == 2 * side**2 * (12 + 2 * side) < 2 * side**4


@pytest.mark.parametrize(
    ("pixels", "error", "match"),
    [
        (torch.rand(1, 3, 16, 16), ValueError, r"photos must be \[B, 3, 32, 32\], got shape \(1, 3, 16, 16\)"),
        (torch.rand(3, 32, 32), ValueError, r"photos must be \[B, 3, 32, 32\], got shape \(3, 32, 32\)"),
        (torch.ones(1, 3, 32, 32, dtype=torch.uint8), TypeError, "photos must be a floating tensor, got "),
        ([1.0], TypeError, "photos must be a floating tensor, got list"),
    ],
)
def test_bad_pixels(pixels: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SamEncoder(SIZES).check("photos", pixels)
