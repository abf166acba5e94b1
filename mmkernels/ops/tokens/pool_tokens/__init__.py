"""Fewer visual tokens by pooling: means, maxima and attention-weighted means of windows, and resized token grids."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import (
    Grid,
    check_grid,
    check_integers,
    check_values,
    check_window,
    grid_as,
    is_one,
    unpack,
)
from mmkernels.ops.tokens.merge_patches.spec import count_tokens
from mmkernels.ops.tokens.pool_tokens.axes import RESIZING, pooled_grid
from mmkernels.ops.tokens.pool_tokens.spec import Arguments, Results, reference, reference_backward
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import check_bool, in_graph, without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["pool_tokens"]

MODES = ("mean", "max", "attention", *RESIZING)
EDGES = ("refuse", "partial", "drop")


def pool_tokens(
    x: Tensor,
    grid: Grid,
    window: Sequence[int] | None = None,
    *,
    size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    mode: str = "mean",
    scores: Tensor | None = None,
    antialias: bool = False,
    edges: str = "refuse",
    backend: str | None = None,
) -> tuple[Tensor, Grid]:
    """Pool the tokens of images, videos or audio over windows, or to grids of a given size.

    Packed images of any resolution take one call, one read and one write, and no transposed copies.

    Args:
        x: ``[tokens, C]``, the images' tokens one after the other; or ``[images, tokens, C]``, all of one size.
            float16, bfloat16, float32 or float64. A strided view, such as ``x[:, 1:]``, is read in place.
        grid: (t, h, w) of each image, as `merge_patches` takes it. Audio is (frames, 1, 1).
        window: (t, h, w) of windows side by side.
        size: (t', h', w') of every image's result, or one for each image, instead of a window. "mean", "max" and
            "attention" cut each axis into parts, as ``F.adaptive_avg_pool3d``; "bilinear" and "bicubic" resize.
        mode: "mean"; "max" (NaN counts as the largest; of equal ones the first gets the gradient); "attention", a mean
            weighted by the softmax of a part's scores; "bilinear" (linear along t too), "bicubic".
        scores: of "attention", ``[tokens]`` or ``[images, tokens]``: a number for each token, x's dtype and device.
            A part with a NaN among them, or with -inf alone, becomes NaN, as by ``torch.softmax``.
        antialias: of "bilinear" and "bicubic", which must then keep t, as ``F.interpolate``'s option.
        edges: of windows that do not divide a grid: "refuse" raises, "partial" pools what is left in a smaller window,
            "drop" leaves it out, as ``F.avg_pool3d`` does by itself.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" or "reference" (any device, float64 too).

    Returns:
        The pooled tokens ``[tokens', C]`` or ``[images, tokens', C]``, in x's dtype, and their grid in the form of
        `grid`; a list of grids if `size` is one for each image. Differentiable with respect to x and scores; second
        derivatives go through the naive formula. Sums are in float32 (float64 for float64 x). Image by image the result
        is that of ``F.avg_pool3d``, ``F.max_pool3d``, their adaptive forms, and ``F.interpolate`` with
        ``align_corners=False``, but for rounding.

    Autocast rounds nothing here: x and scores may differ in their dtype under it, and the wider one is taken.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, grid, window, size or option. Each names
            the argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Li et al., "LLaVA-OneVision", 2024, section 3.2 (bilinear and mean pooling of a video's tokens); Chu et al.,
    "Qwen2-Audio Technical Report", 2024, section 2 (pairs of frames); Keys, "Cubic Convolution Interpolation for
    Digital Image Processing", 1981, eq. 15.

    Example:
        >>> import torch, mmkernels
        >>> x = torch.randn(2 * 4 + 4 * 6, 16)  # two photos
        >>> y, grid = mmkernels.pool_tokens(x, [(1, 2, 4), (1, 4, 6)], (1, 2, 2))
        >>> y.shape, grid
        (torch.Size([8, 16]), ((1, 1, 2), (1, 2, 3)))
        >>> mmkernels.pool_tokens(x, [(1, 2, 4), (1, 4, 6)], size=(1, 2, 2), mode="bilinear")[1]
        ((1, 2, 2), (1, 2, 2))
    """
    if scores is not None:
        x, scores = without_autocast(x, scores)
    sizes = check_grid(x, grid)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    steps, target = _check_target(sizes, window, size, mode, antialias, edges)
    _check_scores(scores, mode, x)
    out = pooled_grid(sizes, steps, target, edges)
    if x.dim() == 3 and any(prod(out[at : at + 3]) != prod(out[:3]) for at in range(0, len(out), 3)):
        what, got = ("size", size) if window is None else ("window", tuple(steps))
        raise ValueError(f"{what} must give each image of x [images, tokens, C] as many tokens, got {got}")
    backend = resolve(backend)
    args = Arguments(
        x=x, scores=scores, grid=sizes, out=out, window=steps, mode=mode, antialias=antialias and mode in RESIZING
    )
    if backend == "reference" and not in_graph():
        with torch._C._DisableAutocast():
            y, *_ = reference(args)
    else:
        y, *_ = OP(args, backend)
    return unpack(y, x), grid_as(grid, out, each=size is not None and not is_one(size))


def _check_target(
    sizes: Sizes, window: Sequence[int] | None, size: object, mode: str, antialias: bool, edges: str
) -> tuple[Sizes, Sizes]:
    """Returns the window and the size, one of which is empty."""
    if (window is None) == (size is None):
        raise ValueError(f"window or size must be given, and not both, got {window} and {size}")
    if edges not in EDGES:
        raise ValueError(f"edges must be one of {', '.join(EDGES)}, got {edges!r}")
    check_bool("antialias", antialias)
    if antialias and mode not in RESIZING:
        raise ValueError(f"antialias must be False for mode={mode!r}")
    if window is not None:
        if mode in RESIZING:
            raise ValueError(f"window must be None for mode={mode!r}, which takes a size")
        steps = check_window(window)
        for at, n in enumerate(sizes):
            if (edges == "refuse" and n % steps[at % 3]) or (edges == "drop" and n < steps[at % 3]):
                image = sizes[at // 3 * 3 : at // 3 * 3 + 3]
                must = "divisible by" if edges == "refuse" else "no smaller than"
                raise ValueError(
                    f"grid must be {must} window {steps} for edges={edges!r}, got {image} of image {at // 3}"
                )
        return steps, ()
    if edges != "refuse":
        raise ValueError(f"edges must be left out where a size is given, got {edges!r}")
    target = check_integers("size", size, "(t, h, w), or one for each image", row=3)
    if len(target) not in (3, len(sizes)) or not target:
        raise ValueError(
            f"size must be (t, h, w), or one for each of {len(sizes) // 3} images, got {len(target)} numbers"
        )
    if mode == "bicubic" or antialias:
        for at in range(0, len(sizes), 3):
            if sizes[at] != target[at % len(target)]:
                raise ValueError(
                    f"size must keep t for mode={mode!r}{' with antialias' * antialias}, "
                    f"got {target[at % len(target)]} for {sizes[at]} of image {at // 3}"
                )
    return (), target


def _check_scores(scores: Tensor | None, mode: str, x: Tensor) -> None:
    if (scores is None) == (mode == "attention"):
        raise ValueError(f"scores must be {'given' if scores is None else 'None'} for mode={mode!r}")
    if scores is None:
        return
    check_values("scores", scores, x)
    if scores.dtype != x.dtype:
        raise TypeError(f"scores must have x's dtype {x.dtype}, got {scores.dtype}")


def _linear(args: Arguments) -> tuple[str, ...]:
    """Returns what the backward pass does not read; second derivatives of "max" look for the largest again, in x."""
    return () if args.mode in ("attention", "max") else ("x",)


def _fake(args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x, rows = args.x, count_tokens(args.out)
    which = (rows, x.shape[-1]) if args.mode == "max" else (0,)
    lse = rows if args.mode == "attention" else 0
    return (
        x.new_empty(rows, x.shape[-1]),
        x.new_empty(which, dtype=torch.int32),
        x.new_empty(lse, dtype=wide_dtype(x)),
    )


OP = define(
    "pool_tokens",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("pool_tokens_cpu"),
        Backend("chunked", reference),  # whose memory is linear already
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=("which", "lse"),
        formula=lambda args: reference(args)[:1],
        backends=[
            triton_kernel(f"{__name__}.triton", "backward"),
            cpu_kernel("pool_tokens_backward_cpu"),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        linear=_linear,
    ),
)
