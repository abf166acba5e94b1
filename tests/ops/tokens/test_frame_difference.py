"""`frame_difference`: by hand, beside `F.cosine_similarity`, on any grid, far from 1, in views, and on bad input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import each_backend, examples, generator, peak_of
from hypothesis import given
from hypothesis import strategies as st
from ops.cpu_tools import each_dtype, each_isa, needs_kernels
from torch import Tensor

from mmkernels import frame_difference, select_tokens
from mmkernels.runtime import cpu

NAN, INF = math.nan, math.inf

every_backend = each_backend("frame_difference")


def _by_frames(x: Tensor, grid: list[tuple[int, int, int]]) -> Tensor:
    """One frame after the other."""
    parts = []
    for video, (t, _, _) in zip(x.split([math.prod(size) for size in grid]), grid, strict=True):
        frames = video.chunk(t)
        parts.append(torch.full((len(frames[0]),), INF, dtype=x.dtype))
        parts += [1 - F.cosine_similarity(b, a, dim=1) for a, b in pairwise(frames)]
    return torch.cat(parts) if parts else x[:, 0]


@every_backend
def test_by_hand(backend: str) -> None:
    """Frames of two tokens: the second frame turns one of them by 60 degrees, the third turns both around."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [math.sqrt(3), 1.0], [-1.0, 0.0], [-math.sqrt(3), -1.0]])
    found = frame_difference(x, [(3, 1, 2)], backend=backend)
    torch.testing.assert_close(found, torch.tensor([INF, INF, 0.0, 0.5, 2.0, 2.0]))
    each = frame_difference(x, [(1, 1, 2), (2, 2, 1)], backend=backend)  # an image, and a video of its own
    torch.testing.assert_close(each, torch.tensor([INF, INF, INF, INF, 2.0, 2.0]))


@every_backend
@examples(30, interpreted=1)
@given(
    grid=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4)), max_size=4),
    channels=st.sampled_from([1, 5, 40, 130]),
    number=st.integers(0, 1000),
)
def test_against_one_frame_after_the_other(
    backend: str, grid: list[tuple[int, int, int]], channels: int, number: int
) -> None:
    x = torch.randn(sum(map(math.prod, grid)), channels, generator=generator(number))
    found = frame_difference(x, grid, backend=backend)
    torch.testing.assert_close(found, _by_frames(x.double(), grid).float(), rtol=1e-5, atol=1e-6)
    if grid and len({tuple(size) for size in grid}) == 1:
        batch = x.unflatten(0, (len(grid), math.prod(grid[0])))
        assert torch.equal(frame_difference(batch, grid[0], backend=backend).flatten(), found)


@every_backend
@pytest.mark.parametrize("channels", [1, 3, 64, 77])
def test_what_does_not_change_differs_by_exactly_nothing(backend: str, channels: int) -> None:
    """So that static tokens tie, whatever their values, and the first ones are kept."""
    still = (
        torch.randn(1, 6, channels, generator=generator(channels)) * torch.tensor([1e-12, 1.0, 1e12]).repeat(2)[:, None]
    )
    found = frame_difference(still.expand(7, 6, channels).flatten(0, 1), [(7, 2, 3)], backend=backend)
    assert found[:6].tolist() == [INF] * 6 and not found[6:].any()


@every_backend
def test_rows_of_zeros_and_rows_that_are_not_finite(backend: str) -> None:
    x = torch.ones(4, 4, 20)
    x[1, 0] = 0  # differs from what was and what comes
    x[1:3, 1] = 0  # two of them
    x[1, 2, 19], x[2, 3, 0] = NAN, -INF
    x[0, 2, 5] = INF  # of a first frame: seen by the second alone
    found = frame_difference(x.flatten(0, 1), [(4, 2, 2)], backend=backend).view(4, 4)
    want = torch.tensor([[INF] * 4, [1, 1, NAN, 0], [1, 1, NAN, NAN], [0, 1, 0, NAN]])
    torch.testing.assert_close(found, want, equal_nan=True)


@every_backend
def test_how_large_rows_are_does_not_matter(backend: str) -> None:
    """Nor whether their squares are floats."""
    x = torch.randn(5, 12, 24, generator=generator())
    powers = torch.randint(-30, 31, (5, 12, 1), generator=generator()).double()
    found = frame_difference((x * 10**powers).float().flatten(0, 1), [(5, 3, 4)], backend=backend)
    torch.testing.assert_close(found, frame_difference(x.flatten(0, 1), [(5, 3, 4)], backend=backend))


@every_backend
def test_rows_of_wide_ranges(backend: str) -> None:
    """The largest value comes last, so that the sums before it are scaled down."""
    x = torch.randn(3, 2, 600, generator=generator()) * torch.logspace(-25, 15, 600)
    found = frame_difference(x.flatten(0, 1), [(3, 1, 2)], backend=backend)
    torch.testing.assert_close(found, frame_difference(x.flatten(0, 1).double(), [(3, 1, 2)]).float())


@needs_kernels
@each_isa
@each_dtype
@pytest.mark.parametrize("channels", [3, 64, 1001])
def test_every_instruction_set(isa: str, dtype: torch.dtype, channels: int) -> None:
    """More positions than a tile, frames in groups of 4, 2 and 1, channels that no vector divides."""
    x = torch.randn(8 * 70 + 3, channels, generator=generator()).to(dtype)
    grid = [(8, 7, 10), (3, 1, 1)]
    with cpu.use_isa(isa):
        found = frame_difference(x, grid, backend="cpu")
    want = frame_difference(x.double(), grid).float()
    torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("grid", [(300, 1, 1), (70, 2, 1), (2, 40, 40)])
def test_threads_cut_positions_and_frames(grid: tuple[int, int, int]) -> None:
    x = torch.randn(math.prod(grid), 512, generator=generator())
    alone = frame_difference(x, [grid], backend="cpu")
    torch.set_num_threads(4)
    assert torch.equal(frame_difference(x, [grid], backend="cpu"), alone)


@every_backend
def test_views_are_read_in_place(backend: str) -> None:
    x = torch.randn(2, 13, 10, generator=generator())
    for view in (x[:, 1:], x[:, 1:].flip(2), x[:, 1:, ::2], x.mT.contiguous().mT[:, 1:], x[:1, 1:].expand(2, 12, 10)):
        want = frame_difference(view.contiguous(), (3, 2, 2), backend=backend)
        assert want.shape == (2, 12)
        torch.testing.assert_close(frame_difference(view, (3, 2, 2), backend=backend), want)
        whole = view.reshape(24, -1)
        torch.testing.assert_close(frame_difference(whole, [(3, 2, 2)] * 2, backend=backend), want.flatten())


@pytest.mark.alone
@needs_kernels
@each_dtype
def test_a_view_is_not_copied_into_memory(dtype: torch.dtype) -> None:
    """Of a view without the class token either."""
    x = torch.randn(4, 2049, 1024).to(dtype)
    assert peak_of(lambda: frame_difference(x[:, 1:], (8, 16, 16), backend="cpu")) < 0.05 * x.nbytes


def test_dtypes_and_no_gradient() -> None:
    x = torch.randn(12, 8, requires_grad=True)
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ):
        found = frame_difference(x.to(dtype), torch.tensor([[3, 2, 2]]))
        assert found.dtype == wide and not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frame_difference(x, [(3, 2, 2)]), frame_difference(x.detach(), [(3, 2, 2)]))
    assert frame_difference(torch.zeros(0, 8), []).shape == (0,)


def test_efficient_video_sampling_in_two_lines() -> None:
    """The tokens that changed are kept, and all of the first frame."""
    frame = torch.randn(16, 32)
    video = torch.stack([frame, frame, frame])
    video[1, 5], video[2, 5], video[2, 9] = torch.randn(3, 32)
    scores = frame_difference(video.flatten(0, 1), [(3, 4, 4)])
    kept = select_tokens(video.flatten(0, 1), [48], 19, scores)
    assert kept.positions.tolist() == [*range(16), 16 + 5, 32 + 5, 32 + 9]


GOOD: dict[str, Any] = {"x": torch.zeros(12, 4), "grid": [(3, 2, 2)]}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"x": torch.zeros(12, 4).int()}, TypeError, "x must be float16.*got torch.int32"),
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "one dim": (
        {"x": torch.zeros(12)},
        ValueError,
        r"x must be \[tokens, C\] or \[images, tokens, C\], got shape \(12,\)",
    ),
    "no channels": ({"x": torch.zeros(12, 0)}, ValueError, r"x must have at least one channel, got shape \(12, 0\)"),
    "another grid": ({"grid": [(3, 2, 3)]}, ValueError, "grid must match x's 12 tokens, got 18 in 1 images"),
    "two numbers": ({"grid": [(3, 4)]}, ValueError, r"grid must be \(t, h, w\) for each image, got \(3, 4\)"),
    "a frame of nothing": ({"grid": [(3, 0, 4)]}, ValueError, "grid must be 1 or more, got 0"),
    "floats": ({"grid": [(3.0, 2, 2)]}, TypeError, r"grid must be integers, \(t, h, w\) for each image, got float"),
    "images of another size": (
        {"x": torch.zeros(2, 12, 4), "grid": (3, 2, 1)},
        ValueError,
        "grid must match x's 12 tokens an image, got 6 in 0",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of .*, or None; got 'gpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        frame_difference(**GOOD | change)
