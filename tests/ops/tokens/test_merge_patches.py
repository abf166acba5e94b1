"""`merge_patches` beside the code of the models that it serves, on any grid, and on bad input."""

from __future__ import annotations

import re
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, each_backend, examples, inputs_in, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import merge_patches

OP = "merge_patches"
every_backend = each_backend(OP, interpreted=False)


@pytest.fixture
def tiles() -> Tensor:
    """[images, h * w, C], of 6 x 6 tokens."""
    return torch.randn(2, 36, 10)


# The models' own code.


@every_backend
def test_equals_the_pixel_shuffle_of_internvl(tiles: Tensor, backend: str) -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    shuffle: Any = InternVLModel.pixel_shuffle
    want = shuffle(None, tiles.view(2, 6, 6, 10), 0.5)
    y, grid = merge_patches(tiles, (1, 6, 6), backend=backend)
    assert torch.equal(y.view_as(want), want) and grid == (1, 3, 3)
    with_class_token = torch.cat([tiles[:, :1], tiles], 1)
    assert torch.equal(merge_patches(with_class_token[:, 1:], (1, 6, 6), backend=backend)[0], y)


@every_backend
@pytest.mark.parametrize("factor", [2, 3])
def test_equals_the_pixel_shuffle_of_idefics3(tiles: Tensor, factor: int, backend: str) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    shuffle: Any = Idefics3Connector.pixel_shuffle
    y, _ = merge_patches(tiles, (1, 6, 6), (1, factor, factor), backend=backend)
    assert torch.equal(y, shuffle(None, tiles, factor))


@every_backend
def test_equals_the_pixel_shuffle_of_llama4(tiles: Tensor, backend: str) -> None:
    from transformers.models.llama4.modeling_llama4 import pixel_shuffle

    assert torch.equal(merge_patches(tiles, (1, 6, 6), backend=backend)[0], pixel_shuffle(tiles, 0.5))


@every_backend
def test_equals_the_patch_merger_of_mistral3(backend: str) -> None:
    """Channel by channel, of photos of several sizes."""
    from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger

    config: Any = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=10, patch_size=14), spatial_merge_size=2, text_config=None
    )
    merger = Mistral3PatchMerger(config)
    merger.merging_layer = torch.nn.Identity()
    x, sizes = torch.randn(4 * 6 + 2 * 8, 10), [(4, 6), (2, 8)]
    want = merger(x, torch.tensor(sizes) * 14)
    y, _ = merge_patches(x, [(1, *size) for size in sizes], order="channel", backend=backend)
    assert torch.equal(y, want)


@every_backend
@pytest.mark.parametrize("side", [6, 7])
def test_equals_the_downsampling_of_deepseek_vl2(side: int, backend: str) -> None:
    """Its projector pads an odd side with zeros, and unfolds."""
    x = torch.randn(2, side * side, 10)
    image = F.pad(x.view(2, side, side, 10), (0, 0, 0, side % 2, 0, side % 2)).permute(0, 3, 1, 2)
    want = F.unfold(image, kernel_size=2, stride=2, padding=0).permute(0, 2, 1)
    y, _ = merge_patches(x, (1, side, side), order="channel", pad=True, backend=backend)
    assert torch.equal(y, want)


@every_backend
def test_equals_the_patch_merger_of_qwen2_vl(backend: str) -> None:
    """Its tokens come window by window, normalized before they are merged."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    merger = PatchMerger(8, 10)
    merger.mlp = torch.nn.Identity()
    with torch.no_grad():
        for p in merger.parameters():
            p.normal_()
        x, grid = torch.randn(2 * 4 * 6 + 8, 10), [(2, 4, 6), (1, 2, 4)]
        y, merged = merge_patches(
            x, grid, order="grouped", norm="layer", norm_first=True, weight=merger.ln_q.weight, bias=merger.ln_q.bias,
            eps=merger.ln_q.eps, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(y, merger(x))
        assert merged == ((2, 2, 3), (1, 1, 2))
        want = merger.ln_q(x).view(-1, 40)
        assert torch.equal(merge_patches(merger.ln_q(x), grid, order="grouped", backend=backend)[0], want)


@every_backend
def test_equals_the_patch_merger_of_qwen3_vl(backend: str) -> None:
    """Its deepstack mergers normalize merged tokens."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    config: Any = SimpleNamespace(hidden_size=10, spatial_merge_size=2, out_hidden_size=8)
    norm = Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True).norm
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
        x = torch.randn(4 * 6, 10)
        more: Any = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        y, _ = merge_patches(x, [(1, 4, 6)], order="grouped", norm="layer", **more, backend=backend)
        torch.testing.assert_close(y, norm(x.view(-1, 40)))


@every_backend
def test_equals_pairs_of_audio_frames(backend: str) -> None:
    x = torch.randn(3, 8, 10)
    assert torch.equal(merge_patches(x, (8, 1, 1), (2, 1, 1), backend=backend)[0], x.reshape(3, 4, 20))


# Any grid.


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    window = tuple(draw(st.integers(1, 3)) for _ in range(3))
    pad = draw(st.booleans())
    order = draw(st.sampled_from(["spatial", "channel"] if pad else ["spatial", "channel", "grouped"]))
    size = lambda step: draw(st.integers(1, 5)) if pad else step * draw(st.integers(1, 3))
    grid = [tuple(size(step) for step in window) for _ in range(draw(st.integers(1, 4)))]
    channels = draw(st.sampled_from([1, 3, 16, 37]))
    norm = draw(st.sampled_from([None, "layer", "rms"]))
    return {"grid": grid, "window": window, "order": order, "pad": pad, "norm": norm, "channels": channels,
            "norm_first": norm is not None and draw(st.booleans())}  # fmt: skip


@pytest.mark.interpreted
@every_backend
@examples(20, interpreted=2)
@given(call=_calls())
def test_any_grid_image_by_image(call: dict[str, Any], backend: str) -> None:
    """Each element of a merged token comes from the patch and the channel that the order says."""
    grid, window, channels = call["grid"], call["window"], call.pop("channels")
    x = torch.randn(sum(map(prod, grid)), channels)
    y, merged = merge_patches(x, **call, backend=backend)
    normal = lambda z: z
    if call["norm"] == "layer":
        normal = lambda z: F.layer_norm(z, z.shape[-1:], eps=1e-6)
    elif call["norm"] == "rms":
        normal = lambda z: F.rms_norm(z, z.shape[-1:], eps=1e-6)
    source = normal(x) if call["norm_first"] else x
    first = row = 0
    for size, out in zip(grid, merged, strict=True):
        tokens = source[first : first + prod(size)]
        for n in range(prod(out)):
            patches = torch.zeros(prod(window), channels)
            corner = (n // (out[1] * out[2]), n // out[2] % out[1], n % out[2])
            for k in range(prod(window)):
                inside = (k // (window[1] * window[2]), k // window[2] % window[1], k % window[2])
                t, h, w = (a * step + b for a, step, b in zip(corner, window, inside, strict=True))
                if t < size[0] and h < size[1] and w < size[2]:
                    at = n * prod(window) + k if call["order"] == "grouped" else (t * size[1] + h) * size[2] + w
                    patches[k] = tokens[at]
            want = (patches.T if call["order"] == "channel" else patches).flatten()
            want = want if call["norm_first"] else normal(want)
            torch.testing.assert_close(y[row], want, rtol=1e-4, atol=1e-5)
            row += 1
        first += prod(size)
    assert row == len(y)


def test_a_grid_in_any_form() -> None:
    x = torch.randn(12, 4)
    tuples = ((1, 2, 2), (1, 4, 2))
    want, grid = merge_patches(x, tuples)
    assert grid == ((1, 1, 1), (1, 2, 1))
    y, grid = merge_patches(x, torch.tensor(tuples))
    assert torch.equal(y, want) and torch.equal(grid, torch.tensor([(1, 1, 1), (1, 2, 1)]))
    y, grid = merge_patches(x[None], (1, 6, 2))
    assert y.shape == (1, 3, 16) and grid == (1, 3, 1)
    y, grid = merge_patches(x, [[np.int64(1), 2, 2], (1, np.int32(4), 2)])
    assert torch.equal(y, want) and grid == ((1, 1, 1), (1, 2, 1))
    y, grid = merge_patches(x[:0], ())
    assert y.shape == (0, 16) and grid == ()
    for none in (torch.empty(0, 3, dtype=torch.int64), merge_patches(x[:0], torch.empty(0, 3, dtype=torch.int64))[1]):
        y, grid = merge_patches(x[:0], none)
        assert y.shape == (0, 16) and grid.shape == (0, 3)


def test_a_grouped_merge_without_a_norm_is_a_view() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    y, _ = merge_patches(x, [(1, 4, 2)], order="grouped")
    assert y.data_ptr() == x.data_ptr()
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, 2 * x)


@every_backend
def test_many_images_and_long_ones(backend: str) -> None:
    """200 images and one of 10,000 patches in a row; float64 has the truth."""
    for grid in ([(1, 2, 2)] * 200, [(1, 1, 10_000)]):
        if backend == "triton" and len(grid) == 1:
            continue  # 5,000 programs of the interpreter
        window = (1, min(2, grid[0][1]), 2)
        x = torch.randn(sum(map(prod, grid)), 3)
        want = merge_patches(x, grid, window, backend="reference")[0]
        assert torch.equal(merge_patches(x, grid, window, backend=backend)[0], want)


@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_of_a_norm_over_many_tokens(norm_first: bool) -> None:
    """Sums of 40,000 rows, which one chain of additions in float32 would round visibly."""
    x, flow = torch.randn(40_000, 4), torch.rand(40_000, 4)
    found, naive, true = [], [], []
    for grads, dtype, backend in ((found, x.dtype, None), (naive, x.dtype, "reference"), (true, torch.float64, None)):
        weight, bias = (torch.full((4,), n, dtype=dtype, requires_grad=True) for n in (1.5, 0.5))
        given = {"norm": "layer", "weight": weight, "bias": bias, "norm_first": norm_first}
        y, _ = merge_patches(x.to(dtype), [(1, 200, 200)], (1, 1, 1), **given, backend=backend)  # type: ignore[arg-type]
        grads += torch.autograd.grad(y, (weight, bias), flow.to(dtype))
    for ours, theirs, truth in zip(found, naive, true, strict=True):
        assert SPECS[OP].over_budget(ours, theirs, truth) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["spatial", "channel"])
def test_results_that_do_not_fit_into_the_caches(order: str, dtype: torch.dtype) -> None:
    """They are written past the caches; odd channels put rows on odd addresses."""
    x = torch.randn(5, 48 * 48, 385).to(dtype)
    for channels in (385, 384):
        part = x[..., :channels]
        found, want = (merge_patches(part, (1, 48, 48), order=order, backend=name)[0] for name in (None, "reference"))
        assert torch.equal(found, want)
        if channels == 384:
            continue
        leaf = part.float().requires_grad_()
        grads = []
        for name in (None, "reference"):
            y, _ = merge_patches(leaf, (1, 48, 48), order=order, norm="layer", backend=name)
            grads.append((y.detach(), *torch.autograd.grad(y.sin().sum(), leaf)))
        torch.testing.assert_close(*grads)


def test_autocast_takes_the_widest_dtype() -> None:
    x, weight = torch.randn(16, 4, dtype=torch.bfloat16), torch.randn(16)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = merge_patches(x, [(1, 4, 4)], norm="rms", weight=weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, merge_patches(x.float(), [(1, 4, 4)], norm="rms", weight=weight)[0])


# Bad input.

X = torch.randn(24, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.ones(24, 4, dtype=torch.int64)}, TypeError, "x must be float16, .*, got torch.int64"),
    ({"x": X[0]}, ValueError, r"x must be \[tokens, C\] or \[images, tokens, C\], got shape \(4,\)"),
    ({"x": X[:, :0]}, ValueError, r"x must have at least one channel, got shape \(24, 0\)"),
    ({"x": X[None][:0], "grid": (1, 4, 6)}, ValueError, r"x must have an image or more .* got shape \(0, 24, 4\)"),
    ({"grid": [(1, 4, 4)]}, ValueError, "grid must match x's 24 tokens, got 16 in 1 images"),
    ({"grid": [(1, 4, 0)]}, ValueError, "grid must be 1 or more, got 0"),
    ({"grid": [(1, -4, -6)]}, ValueError, "grid must be 1 or more, got -4"),
    ({"grid": [(4, 6)]}, ValueError, r"grid must be \(t, h, w\) for each image, got \(4, 6\)"),
    ({"grid": [1, 4, 4, 1, 4, 2]}, ValueError, r"grid must be \(t, h, w\) for each image, got 6 numbers"),
    ({"grid": torch.tensor([1, 4, 4, 1, 4, 2])}, ValueError, r"grid must be \(t, h, w\) for each .*, got shape \(6,\)"),
    ({"grid": torch.tensor([[1, 1], [4, 4], [4, 2]])}, ValueError, r"grid must be .* image, got shape \(3, 2\)"),
    ({"grid": [(1, 4, 4), 1, 4, 2]}, ValueError, r"grid must be \(t, h, w\) for each image, got 1"),
    ({"window": [(1, 2, 2)]}, TypeError, r"window must be integers, \(t, h, w\), got tuple"),
    ({"grid": [(1, 4.0, 6)]}, TypeError, r"grid must be integers, .*, got float"),
    ({"grid": torch.ones(1, 3)}, TypeError, "grid must be integers, .*, got torch.float32"),
    ({"grid": 24}, TypeError, "grid must be a sequence of integers, .*, got int"),
    ({"window": (2, 2)}, ValueError, r"window must be \(t, h, w\), got 2 numbers"),
    ({"window": (1, 0, 2)}, ValueError, "window must be 1 or more, got 0"),
    ({"window": (1, True, 2)}, TypeError, r"window must be integers, \(t, h, w\), got bool"),
    ({"window": (1, 8, 8)}, ValueError, r"grid must be divisible by window \(1, 8, 8\); pad=True adds zeros; got"),
    ({"window": (2, 2, 2)}, ValueError, r"grid must be divisible by .*; got \(1, 4, 6\) of image 0"),
    (
        {"x": X.view(2, 12, 4), "grid": [(1, 2, 6), (1, 3, 4)], "pad": True},
        ValueError,
        r"window must give each image of x \[images, tokens, C\] as many tokens, got \(1, 2, 2\)",
    ),
    ({"window": (1, 3, 2), "pad": True, "order": "grouped"}, ValueError, 'grid must be .*; order "grouped" takes no'),
    ({"pad": "no"}, TypeError, "pad must be a bool, got str"),
    ({"norm_first": True}, ValueError, "norm_first must be False for norm=None"),
    (
        {"window": (1, 2**20, 2**20), "pad": True},
        ValueError,
        r"window must leave a merged token fewer than 2\^31 channels, got \(1, 1048576, 1048576\)",
    ),
    ({"norm": "layer", "norm_first": 1}, TypeError, "norm_first must be a bool, got int"),
    ({"order": "row"}, ValueError, "order must be one of spatial, channel, grouped, got 'row'"),
    ({"norm": "batch"}, ValueError, 'norm must be None, "layer" or "rms", got \'batch\''),
    ({"weight": X[0]}, ValueError, "weight must be None for norm=None"),
    ({"norm": "rms", "bias": torch.ones(16)}, ValueError, "bias must be None for norm='rms'"),
    ({"norm": "layer", "weight": X[0]}, ValueError, r"weight must be \[16\], of a merged token, got shape \(4,\)"),
    ({"norm": "layer", "norm_first": True, "bias": torch.ones(16)}, ValueError, r"bias must be \[4\], of one token"),
    ({"norm": "layer", "weight": torch.ones(16).double()}, TypeError, "weight must have x's dtype torch.float32"),
    ({"norm": "layer", "weight": torch.ones(16, device="meta")}, ValueError, "weight must be on x's device cpu"),
    ({"norm": "layer", "weight": 1.0}, TypeError, "weight must be a tensor, got float"),
    ({"norm": "layer", "eps": -1.0}, ValueError, "eps must be a number from 0 on, got -1.0"),
    ({"norm": "layer", "eps": "1"}, TypeError, "eps must be a number from 0 on, got str"),
]


@pytest.mark.parametrize(
    ("given", "error", "message"), BAD, ids=[re.sub(r"\W+", "_", message)[:60] for *_, message in BAD]
)
def test_bad_input(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        merge_patches(**{"x": X, "grid": [(1, 4, 6)]} | given)


# Exactness.


@pytest.mark.interpreted
@every_backend
def test_without_a_norm_no_bit_changes(backend: str) -> None:
    """NaN and infinities too, forward and backward."""
    for case in SPECS[OP].cases:
        inputs = inputs_in(SPECS[OP], case)
        if "norm" in inputs or not inputs["x"].numel():
            continue
        inputs["x"].view(-1)[::7] = torch.nan
        inputs["x"].view(-1)[1::7] = torch.inf
        found, want = (run(SPECS[OP], case, inputs, name) for name in (backend, "reference"))
        for a, b in zip(found.tensors, want.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
