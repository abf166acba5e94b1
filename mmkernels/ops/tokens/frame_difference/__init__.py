"""How much each token of a video differs from the token at the same place of the frame before."""

from __future__ import annotations

from math import prod

from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.frame_difference.spec import Arguments, Results, reference
from mmkernels.ops.tokens.inputs import Grid, check_grid, unpack
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, define, resolve

__all__ = ["frame_difference"]


def frame_difference(x: Tensor, grid: Grid, *, backend: str | None = None) -> Tensor:
    """Returns ``1 - cos(x[t, h, w], x[t - 1, h, w])`` of each token: the score of Efficient Video Sampling (EVS).

    A token that did not change since the frame before has a difference of 0, exactly where both are equal, and can be
    left out: `select_tokens` with these scores keeps those that changed most. The first frame of each video is always
    kept: its differences are +inf. The differences only choose, and have no gradient.

    Args:
        x: ``[tokens, C]``, the videos' tokens one after the other, each frame by frame; or ``[images, tokens, C]``, all
            of one size. float16, bfloat16, float32 or float64. A strided view, such as ``x[:, 1:]``, is read in place.
        grid: (t, h, w) of each video: a list of tuples, or integers ``[images, 3]``; one (t, h, w) serves all videos of
            ``x [images, tokens, C]``. A tensor's values must be read: one on a GPU waits for it, and compiled code
            wants tuples. An image has t = 1; audio is (frames, 1, 1).
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" or "reference" (any device, float64 too).

    Returns:
        ``[tokens]`` or ``[images, tokens]``, float32 (float64 for a float64 x): from 0 to 2 but for rounding. The
        cosine with a row of zeros is 0, so the difference 1. NaN where one of the two rows is not finite. Products are
        summed in float32 (float64), whatever the size of the values.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, or a grid that does not match the tokens. Each
            names the argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
    2025.

    Example:
        >>> import torch, mmkernels
        >>> frame = torch.eye(4)
        >>> video = torch.cat([frame, frame, frame.flip(0)])  # three frames of 2 x 2; the last one differs
        >>> mmkernels.frame_difference(video, [(3, 2, 2)])
        tensor([inf, inf, inf, inf, 0., 0., 0., 0., 1., 1., 1., 1.])
    """
    sizes = check_grid(x, grid)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    difference: Tensor = OP(Arguments(x=x.detach(), grid=sizes), resolve(backend))
    return unpack(difference, x)


def _fake(args: Arguments) -> Tensor:
    return args.x.new_empty(prod(args.x.shape[:-1]), dtype=wide_dtype(args.x))


OP = define(
    "frame_difference",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("frame_difference_cpu"),
        Backend("chunked", reference),  # whose memory is linear already
        Backend("reference", reference),
    ],
)
