"""Windows of visual tokens merged into one token each: pixel shuffle and patch mergers, a norm included."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mmkernels.ops.tokens.inputs import Grid, check_grid, check_window, grid_as, unpack
from mmkernels.ops.tokens.merge_patches.spec import (
    Arguments,
    Results,
    count_tokens,
    merged_grid,
    reference,
    reference_backward,
)
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import can_look, check_bool, check_floating, check_number, in_graph, without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["merge_patches"]

ORDERS = ("spatial", "channel", "grouped")


def merge_patches(
    x: Tensor,
    grid: Grid,
    window: Sequence[int] = (1, 2, 2),
    *,
    order: str = "spatial",
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_first: bool = False,
    pad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Grid]:
    """Concatenate the channels of each window of tokens: space to depth, in one read and one write of the data.

    Args:
        x: ``[tokens, C]``, the images' tokens one after the other; or ``[images, tokens, C]``, all of one size.
            float16, bfloat16, float32 or float64. A strided view, such as ``x[:, 1:]``, is read in place.
        grid: (t, h, w) of each image: a list of tuples, or integers ``[images, 3]``; one (t, h, w) serves all images of
            ``x [images, tokens, C]``. A tensor's values must be read: one on a GPU waits for it, and compiled code
            wants tuples. Audio is (frames, 1, 1).
        window: (t, h, w) of the patches that are merged, P = t * h * w of them.
        order: how a window's tokens lie in a merged one, and in x:
            "spatial": token after token, channel c of patch p at ``p * C + c`` (InternVL, Idefics3, SmolVLM, Llama 4);
            "channel": channel after channel, at ``c * P + p``, as ``F.unfold`` (DeepSeek-VL2, Mistral 3);
            "grouped": as "spatial", of tokens that come window by window (Qwen2-VL and later).
        norm: None, "layer" or "rms": a norm of the merged tokens, each over its ``P * C`` channels.
        weight: of the norm, ``[P * C]``, x's dtype and device.
        bias: of "layer", as weight.
        eps: of the norm, >= 0.
        norm_first: normalize x instead, each token over its C channels; weight and bias are ``[C]``.
        pad: where the window does not divide a grid, add tokens of zeros behind t, h and w (after a norm of x, before
            one of the merged tokens). False: such a grid is an error.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" or "reference" (any device, float64 too).

    Returns:
        The merged tokens ``[tokens', P * C]`` or ``[images, tokens', P * C]``, in x's dtype, and their grid in the form
        of `grid`. Grouped tokens without a norm are a view of x where x allows one. Differentiable with respect to x,
        weight and bias; second derivatives go through the naive formula.

    A norm's sums are in float32 (float64 for float64 x). Under autocast x, weight and bias may differ in their dtype,
    and the widest is taken, as autocast makes PyTorch's norms compute in float32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, grid, window or option. Each names the
            argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: the pixel shuffle of Chen et al., "How Far Are We to GPT-4V?" (InternVL 1.5), 2024, section 3.1; the patch
    merger of Wang et al., "Qwen2-VL", 2024, section 2.1; Shi et al., "Real-Time Single Image and Video Super-Resolution
    Using an Efficient Sub-Pixel Convolutional Neural Network", 2016, whose inverse this is.

    Example:
        >>> import torch, mmkernels
        >>> x = torch.randn(2 * 4 + 4 * 6, 16)  # two photos
        >>> y, grid = mmkernels.merge_patches(x, [(1, 2, 4), (1, 4, 6)], norm="layer")
        >>> y.shape, grid
        (torch.Size([8, 64]), ((1, 1, 2), (1, 2, 3)))
    """
    tensors = [part for part in (x, weight, bias) if part is not None]
    if len(tensors) > 1:
        cast = iter(without_autocast(*tensors))
        x, weight, bias = (None if part is None else next(cast) for part in (x, weight, bias))  # type: ignore[assignment]
    sizes, steps = check_grid(x, grid), check_window(window)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if norm not in (None, "layer", "rms"):
        raise ValueError(f'norm must be None, "layer" or "rms", got {norm!r}')
    check_bool("pad", pad)
    check_bool("norm_first", norm_first)
    if norm_first and norm is None:
        raise ValueError("norm_first must be False for norm=None")
    if x.shape[-1] * prod(steps) >= 2**31:
        raise ValueError(f"window must leave a merged token fewer than 2^31 channels, got {tuple(steps)}")
    _check_whole(sizes, steps, order, pad)
    _check_parameter("weight", weight, norm, x, steps, norm_first)
    _check_parameter("bias", bias, norm, x, steps, norm_first)
    eps = check_number("eps", eps, "a number from 0 on", 0.0)
    merged = merged_grid(sizes, steps)
    if x.dim() == 3 and any(prod(merged[at : at + 3]) != prod(merged[:3]) for at in range(0, len(merged), 3)):
        raise ValueError(f"window must give each image of x [images, tokens, C] as many tokens, got {tuple(steps)}")
    backend = resolve(backend)
    args = Arguments(
        x=x,
        weight=weight,
        bias=bias,
        grid=sizes,
        window=steps,
        order=order,
        norm=norm or "",
        norm_first=norm_first,
        eps=eps,
    )
    if order == "grouped" and norm is None:
        if backend and can_look(x):  # so that a backend that can't run is an error here too
            OP.choose(backend, args)
        y = x.reshape(-1, x.shape[-1] * prod(steps))
        return unpack(y, x), grid_as(grid, merged)
    if backend == "reference" and not in_graph():
        with torch._C._DisableAutocast():
            y = reference(args)
    else:
        y = OP(args, backend)
    return unpack(y, x), grid_as(grid, merged)


def _check_whole(sizes: Sizes, window: Sizes, order: str, pad: bool) -> None:
    for at, size in enumerate(sizes):
        if (not pad or order == "grouped") and size % window[at % 3]:
            image = at // 3
            how = '; order "grouped" takes no padding' if pad else "; pad=True adds zeros"
            raise ValueError(
                f"grid must be divisible by window {tuple(window)}{how}; "
                f"got {tuple(sizes[3 * image : 3 * image + 3])} of image {image}"
            )


def _check_parameter(
    name: str, parameter: Tensor | None, norm: str | None, x: Tensor, window: Sizes, norm_first: bool
) -> None:
    if parameter is None:
        return
    if norm is None or (norm == "rms" and name == "bias"):
        raise ValueError(f"{name} must be None for norm={norm!r}")
    check_floating(name, parameter)
    if parameter.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {parameter.dtype}")
    width = x.shape[-1] * (1 if norm_first else prod(window))
    if tuple(parameter.shape) != (width,):
        raise ValueError(
            f"{name} must be [{width}], {'of one token' if norm_first else 'of a merged token'}, "
            f"got shape {tuple(parameter.shape)}"
        )
    if not (parameter.is_cpu and x.is_cpu) and parameter.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {parameter.device}")


def _fake(args: Arguments) -> Tensor:
    tokens = count_tokens(merged_grid(args.grid, args.window))
    return args.x.new_empty(tokens, args.x.shape[-1] * prod(args.window))


OP = define(
    "merge_patches",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("merge_patches_cpu"),
        Backend("chunked", reference),  # whose memory is linear already
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=(),
        formula=lambda args: (reference(args),),
        backends=[
            triton_kernel(f"{__name__}.triton", "backward"),
            cpu_kernel("merge_patches_backward_cpu"),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        linear=lambda args: () if args.norm else ("x",),
    ),
)
