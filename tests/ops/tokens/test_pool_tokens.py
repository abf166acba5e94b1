"""`pool_tokens` beside PyTorch's pooling and resizing image by image, beside the models' own code, and on bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import each_backend, examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import pool_tokens

OP = "pool_tokens"
every_backend = each_backend(OP, interpreted=False)


def _image_by_image(x: Tensor, grid: Any, one: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Returns the packed results of `one`, a function of an image [1, C, t, h, w] and its number."""
    parts = x.split([prod(size) for size in grid])
    results = [
        one(part.view(*size, -1).permute(3, 0, 1, 2)[None], n)
        for n, (part, size) in enumerate(zip(parts, grid, strict=True))
    ]
    return torch.cat([y[0].flatten(1).T for y in results])


def _frame_by_frame(image: Tensor, size: Any, mode: str, antialias: bool) -> Tensor:
    """``F.interpolate`` of photos, which leaves t alone."""
    frames = F.interpolate(image[0].transpose(0, 1), size[1:], mode=mode, antialias=antialias)
    return frames.transpose(0, 1)[None]


def _interpolate(image: Tensor, size: Any, mode: str, antialias: bool) -> Tensor:
    if mode == "bilinear" and not antialias:
        return F.interpolate(image, size, mode="trilinear")
    return _frame_by_frame(image, size, mode, antialias)


def _same(x: Tensor, found: Callable[[Tensor], Tensor], want: Callable[[Tensor], Tensor]) -> None:
    """The same result and the same gradient."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, z = found(leaves[0]), want(leaves[1])
    torch.testing.assert_close(y, z, rtol=1e-4, atol=2e-5)
    flow = torch.randn_like(z)
    grads = [torch.autograd.grad(y, leaf, flow)[0] for y, leaf in ((y, leaves[0]), (z, leaves[1]))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-5)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
grids = st.lists(sizes, min_size=1, max_size=4)
channels = st.sampled_from([1, 16, 37])


@pytest.mark.interpreted
@every_backend
@examples(15, interpreted=1)
@given(grid=grids, window=st.tuples(*[st.integers(1, 3)] * 3), mode=st.sampled_from(["mean", "max"]), c=channels)
def test_windows_image_by_image(grid: Any, window: Any, mode: str, c: int, backend: str) -> None:
    """Partial windows, as with ceil_mode; dropped ones, where each image has a whole one."""
    fits = all(n >= step for size in grid for n, step in zip(size, window, strict=True))

    def pool(image: Tensor, edges: str) -> Tensor:
        kernel = [min(n, step) for n, step in zip(image.shape[2:], window, strict=True)]  # PyTorch refuses larger ones
        if mode == "max":
            return F.max_pool3d(image, kernel, ceil_mode=edges == "partial")
        return F.avg_pool3d(image, kernel, ceil_mode=edges == "partial", count_include_pad=False)

    for edges in ("partial", "drop") if fits else ("partial",):
        _same(
            torch.randn(sum(map(prod, grid)), c),
            lambda x, e=edges: pool_tokens(x, grid, window, mode=mode, edges=e, backend=backend)[0],
            lambda x, e=edges: _image_by_image(x, grid, lambda image, n: pool(image, e)),
        )


@pytest.mark.interpreted
@every_backend
@examples(15, interpreted=1)
@given(grid=grids, size=sizes, mode=st.sampled_from(["mean", "max"]), c=channels)
def test_adaptive_image_by_image(grid: Any, size: Any, mode: str, c: int, backend: str) -> None:
    """Parts overlap where they do not divide an axis, and repeat where they are more than its tokens."""
    pool: Any = F.adaptive_max_pool3d if mode == "max" else F.adaptive_avg_pool3d
    _same(
        torch.randn(sum(map(prod, grid)), c),
        lambda x: pool_tokens(x, grid, size=size, mode=mode, backend=backend)[0],
        lambda x: _image_by_image(x, grid, lambda i, n: pool(i, size)),
    )


@pytest.mark.interpreted
@every_backend
@examples(20, interpreted=1)
@given(
    grid=grids, targets=st.lists(sizes, min_size=4, max_size=4), c=channels,
    mode=st.sampled_from(["bilinear", "bicubic"]), antialias=st.booleans(),
)  # fmt: skip
def test_resized_image_by_image(grid: Any, targets: Any, c: int, mode: str, antialias: bool, backend: str) -> None:
    """Each image to a size of its own. With antialias torch 2.13 is wrong for a width of 1, see the next test."""
    if antialias:
        grid, targets = ([(*size[:2], size[2] + 1) for size in some] for some in (grid, targets))
    keeps_t = mode == "bicubic" or antialias
    size = [(old[0] if keeps_t else new[0], *new[1:]) for old, new in zip(grid, targets, strict=False)]
    _same(
        torch.randn(sum(map(prod, grid)), c),
        lambda x: pool_tokens(x, grid, size=size, mode=mode, antialias=antialias, backend=backend)[0],
        lambda x: _image_by_image(x, grid, lambda i, n: _interpolate(i, size[n], mode, antialias)),
    )


@every_backend
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_column_is_resized_as_a_row_is(mode: str, backend: str) -> None:
    def resize(x: Tensor, grid: Any, size: Any, antialias: bool) -> Tensor:
        return pool_tokens(x, [grid], size=size, mode=mode, antialias=antialias, backend=backend)[0]

    for antialias, n in ((False, 7), (True, 2), (True, 7)):
        _same(
            torch.randn(5, 3),
            partial(resize, grid=(1, 5, 1), size=(1, n, 1), antialias=antialias),
            partial(resize, grid=(1, 1, 5), size=(1, 1, n), antialias=antialias),
        )


@pytest.mark.interpreted
@every_backend
@examples(10, interpreted=1)
@given(grid=grids, size=sizes, c=channels)
def test_attention_is_a_softmax_over_each_part(grid: Any, size: Any, c: int, backend: str) -> None:
    x, scores = torch.randn(sum(map(prod, grid)), c), 3 * torch.randn(sum(map(prod, grid)))
    y, _ = pool_tokens(x, grid, size=size, mode="attention", scores=scores, backend=backend)
    weights = scores.exp()[:, None]
    mean = lambda z: pool_tokens(z, grid, size=size, backend="reference")[0]
    torch.testing.assert_close(y, mean(weights * x) / mean(weights), rtol=1e-4, atol=1e-5)


# The models' own code.


@every_backend
@pytest.mark.parametrize("frames", [8, 9])
def test_equals_the_pooling_of_qwen2_audio(frames: int, backend: str) -> None:
    """Pairs of frames; the odd one is dropped."""
    x = torch.randn(3, frames, 10)
    want = torch.nn.AvgPool1d(2, stride=2)(x.permute(0, 2, 1)).permute(0, 2, 1)
    y, grid = pool_tokens(x, (frames, 1, 1), (2, 1, 1), edges="drop", backend=backend)
    torch.testing.assert_close(y, want, rtol=0, atol=2e-7)
    assert grid == (4, 1, 1)


@every_backend
@pytest.mark.parametrize("side", [6, 7])
def test_equals_the_pooling_of_llava_onevision(side: int, backend: str) -> None:
    """A video's frames, each to half of its side, rounded up."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    x, pooling = torch.randn(3, side * side, 10), LlavaOnevisionModel.apply_pooling
    config: Any = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=1)))
    half = (side + 1) // 2
    y, grid = pool_tokens(x, (1, side, side), size=(1, half, half), mode="bilinear", backend=backend)
    torch.testing.assert_close(y, pooling(config, x))
    assert grid == (1, half, half)


@every_backend
def test_equals_the_resized_positions_of_siglip2(backend: str) -> None:
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    positions, sizes = torch.randn(16, 16, 10), [(9, 13), (20, 4)]
    want = Siglip2VisionEmbeddings.resize_positional_embeddings(positions, torch.tensor(sizes), 117)
    packed, grid = positions.flatten(0, 1).repeat(2, 1), [(1, 16, 16)] * 2
    size = [(1, *one) for one in sizes]
    y, _ = pool_tokens(packed, grid, size=size, mode="bilinear", antialias=True, backend=backend)
    for part, padded in zip(y.split([117, 80]), want, strict=True):
        torch.testing.assert_close(part, padded[: len(part)], rtol=1e-4, atol=1e-5)


# Values.


@every_backend
def test_the_largest_of_equal_numbers_and_nan(backend: str) -> None:
    """The first of equal ones gets the gradient; NaN counts as the largest."""
    x = torch.tensor([[1.0, 0.0], [1.0, torch.nan], [0.0, 2.0], [1.0, 3.0]], requires_grad=True)
    y, _ = pool_tokens(x, [(1, 2, 2)], (1, 2, 2), mode="max", backend=backend)
    torch.testing.assert_close(y, torch.tensor([[1.0, torch.nan]]), equal_nan=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


@every_backend
def test_nan_and_infinity_reach_only_what_takes_them(backend: str) -> None:
    x = torch.ones(16, 3)
    x[0], x[3] = torch.nan, torch.inf
    for more in ({"window": (1, 2, 2)}, {"size": (1, 2, 2)}, {"size": (1, 4, 4), "mode": "bilinear"}):
        y, _ = pool_tokens(x, [(1, 4, 4)], **more, backend=backend)
        assert bool(y[0].isnan().all()) and bool((y[len(y) // 2 :] == 1).all())
    scores = torch.zeros(16)
    scores[5] = -torch.inf  # a token that weighs nothing
    y, _ = pool_tokens(torch.ones(16, 3), [(1, 4, 4)], (1, 4, 4), mode="attention", scores=scores, backend=backend)
    torch.testing.assert_close(y, torch.ones(1, 3))


@every_backend
def test_many_images_and_long_ones(backend: str) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = [([(1, 2, 2)] * 200, {"window": (1, 2, 2)})]
    if backend != "triton":  # whose interpreter would run thousands of programs
        calls += [([(1, 1, 10_000)], {"size": (1, 1, 3)}), ([(1, 100, 100)], {"size": (1, 1, 1), "mode": "max"})]
    for grid, more in calls:
        x = torch.randn(sum(map(prod, grid)), 3)
        want = pool_tokens(x.double(), grid, **more)[0]
        torch.testing.assert_close(pool_tokens(x, grid, **more, backend=backend)[0].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mean", "max", "bilinear"])
def test_results_that_do_not_fit_into_the_caches(mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 40 * 40, 1001).to(dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = []
    for backend, leaf in zip((None, "reference"), leaves, strict=True):
        y, _ = pool_tokens(leaf, (1, 40, 40), size=(1, 39, 40), mode=mode, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), leaf)))
    torch.testing.assert_close(
        *results, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2
    )


def test_grids_and_sizes_in_any_form() -> None:
    x, tuples = torch.randn(24, 4), ((1, 2, 4), (1, 4, 4))
    y, grid = pool_tokens(x, torch.tensor(tuples), (1, 2, 2))
    assert torch.equal(grid, torch.tensor([(1, 1, 2), (1, 2, 2)])) and y.shape == (6, 4)
    y, grid = pool_tokens(x, tuples, size=torch.tensor([(1, 1, 1), (1, 3, 2)]))
    assert grid == ((1, 1, 1), (1, 3, 2)) and y.shape == (7, 4)
    y, grid = pool_tokens(x[None], (2, 3, 4), size=(1, 1, 4))
    assert grid == (1, 1, 4) and y.shape == (1, 4, 4)
    y, grid = pool_tokens(x.view(2, 12, 4), (1, 3, 4), size=[(1, 2, 3), (1, 3, 2)])  # one grid, but a size for each
    assert grid == ((1, 2, 3), (1, 3, 2)) and y.shape == (2, 6, 4)
    y, grid = pool_tokens(x.view(2, 12, 4), torch.tensor((1, 3, 4)), size=[(1, 2, 3), (1, 3, 2)])
    assert torch.equal(grid, torch.tensor([(1, 2, 3), (1, 3, 2)])) and y.shape == (2, 6, 4)
    y, grid = pool_tokens(x[:0], (), (1, 2, 2))
    assert grid == () and y.shape == (0, 4)


# Bad input.

X = torch.randn(24, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": X[:, :0]}, ValueError, r"x must have at least one channel, got shape \(24, 0\)"),
    ({"grid": [(1, 4, 4)]}, ValueError, "grid must match x's 24 tokens, got 16 in 1 images"),
    ({"grid": [(0, 4, 6)]}, ValueError, "grid must be 1 or more, got 0"),
    ({"mode": "median"}, ValueError, "mode must be one of mean, max, attention, bilinear, bicubic, got 'median'"),
    ({"window": None}, ValueError, "window or size must be given, and not both, got None and None"),
    ({"size": (1, 2, 2)}, ValueError, r"window or size must be given, and not both, got \(1, 2, 2\) and"),
    (
        {"window": (1, 3, 4)},
        ValueError,
        r"grid must be divisible by window \(1, 3, 4\) for edges='refuse', got \(1, 4, 6\)",
    ),
    (
        {"window": (1, 8, 8), "edges": "drop"},
        ValueError,
        "grid must be no smaller than window .* for edges='drop', got",
    ),
    ({"window": (1, 0, 2)}, ValueError, "window must be 1 or more, got 0"),
    ({"window": (2, 2)}, ValueError, r"window must be \(t, h, w\), got 2 numbers"),
    (
        {"window": (1, 2, 2), "mode": "bilinear"},
        ValueError,
        "window must be None for mode='bilinear', which takes a size",
    ),
    (
        {"window": None, "size": (1, 2, 2), "edges": "partial"},
        ValueError,
        "edges must be left out where a size is given, got 'partial'",
    ),
    ({"edges": "wrap"}, ValueError, "edges must be one of refuse, partial, drop, got 'wrap'"),
    ({"antialias": "no"}, TypeError, "antialias must be a bool, got str"),
    ({"antialias": True}, ValueError, "antialias must be False for mode='mean'"),
    ({"window": None, "size": (1, 0, 2)}, ValueError, "size must be 1 or more, got 0"),
    (
        {"window": None, "size": [(1, 2, 2)] * 2},
        ValueError,
        r"size must be \(t, h, w\), or one for each of 1 images, got 6 numbers",
    ),
    ({"window": None, "size": (2, 2)}, ValueError, r"size must be \(t, h, w\), or one for each image, got 2 numbers"),
    ({"window": None, "size": [(2, 2)]}, ValueError, r"size must be \(t, h, w\), or one for each image, got \(2, 2\)"),
    ({"window": None, "size": 2}, TypeError, "size must be a sequence of integers, .*, got int"),
    (
        {"window": None, "size": (2, 2, 2), "mode": "bicubic"},
        ValueError,
        "size must keep t for mode='bicubic', got 2 for 1",
    ),
    (
        {"window": None, "size": (2, 2, 2), "mode": "bilinear", "antialias": True},
        ValueError,
        "size must keep t for mode='bilinear' with antialias, got 2 for 1 of image 0",
    ),
    (
        {"x": X.view(2, 12, 4), "grid": (1, 3, 4), "window": None, "size": [(1, 1, 1), (1, 1, 2)]},
        ValueError,
        r"size must give each image of x \[images, tokens, C\] as many tokens, got",
    ),
    (
        {"x": X.view(2, 12, 4), "grid": [(1, 2, 6), (1, 3, 4)], "window": (1, 2, 2), "edges": "partial"},
        ValueError,
        r"window must give each image of x \[images, tokens, C\] as many tokens, got \(1, 2, 2\)",
    ),
    ({"mode": "attention"}, ValueError, "scores must be given for mode='attention'"),
    ({"scores": X[:, 0]}, ValueError, "scores must be None for mode='mean'"),
    ({"mode": "attention", "scores": X}, ValueError, r"scores must be \[24\], one for each token, got shape \(24, 4\)"),
    ({"mode": "attention", "scores": X[:, 0].double()}, TypeError, "scores must have x's dtype torch.float32, got"),
    ({"mode": "attention", "scores": X[:, 0].to("meta")}, ValueError, "scores must be on x's device cpu, got meta"),
    ({"mode": "attention", "scores": [0.0] * 24}, TypeError, "scores must be a tensor, got list"),
]
BAD_IDS = [re.sub(r"\W+", "_", message)[:60] for *_, message in BAD]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=BAD_IDS)
def test_bad_input(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        pool_tokens(**{"x": X, "grid": [(1, 4, 6)], "window": (1, 2, 2)} | given)
