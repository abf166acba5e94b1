"""Visual tokens put into text embeddings, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.tokens.scatter_tokens.spec import Arguments, Results, reference, reference_backward
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import check_floating, check_tensor, without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["scatter_tokens"]

_MODES = ("replace", "add")


def scatter_tokens(
    embeddings: Tensor, visual: Tensor, positions: Tensor, *, mode: str = "replace", backend: str | None = None
) -> Tensor:
    """Puts visual tokens into text embeddings: a new tensor, written once, with no clone first.

    It takes the place of ``inputs_embeds.masked_scatter(mask[..., None].expand_as(inputs_embeds), features)``, by which
    transformers' LLaVA and Qwen-VL models fill in their image tokens, and with ``mode="add"`` of DeepStack's
    ``hidden[mask] += features``.

    Args:
        embeddings: ``[B, L, C]``, or packed ``[T, C]``; float16, bfloat16, float32 or float64.
        visual: ``[V, C]``, embeddings' dtype and device: ``features.to(embeddings.dtype)`` if it is another.
        positions: where each visual token goes: int64 ``[V]``, its row of the ``B * L`` (or T) rows of embeddings, in
            any order; or a bool mask ``[B, L]`` (or ``[T]``), true V times, which the visual tokens fill in order. On
            embeddings' device.
        mode: "replace", or "add": to the embeddings that are there.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" or "reference" (any device, float64 too).

    Returns:
        As embeddings, contiguous. Differentiable with respect to embeddings and visual; what flows back to embeddings
        in mode "add" is handed on without a copy. Neither tensor is kept for the backward pass.

    On a GPU positions are not looked at, which would wait for the device. The result is defined there too, and does not
    depend on an order of writes: a position outside of the embeddings (a negative one too) puts its token nowhere, and
    of equal positions the last in `positions` counts, in mode "add" too. Of a mask, places after the V-th keep their
    embeddings, and visual tokens that are too many go nowhere. A token that goes nowhere has gradient 0.

    Autocast rounds nothing here; under it embeddings and visual may differ in dtype, and the wider one is taken.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or mode; on a CPU also positions that are
            negative, too large or repeated, or a mask that is not true V times. Each names the argument, what it must
            be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Liu et al., "Visual Instruction Tuning", 2023, section 4.1, where visual tokens stand among the words';
    Meng et al., "DeepStack", 2024, equation 4, for ``mode="add"``.

    Example:
        >>> import torch, mmkernels
        >>> ids = torch.tensor([[5, 9, 9, 9, 2], [9, 9, 9, 7, 1]])  # 9: the image token
        >>> text, image = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
        >>> embeddings = mmkernels.scatter_tokens(text, image.flatten(0, 1), ids == 9)
        >>> torch.equal(embeddings[1, :3], image[1])
        True
    """
    embeddings, visual = without_autocast(embeddings, visual)
    args = Arguments(embeddings=embeddings, visual=visual, positions=positions, mode=mode)
    _check(args)
    out: Tensor = OP(args, resolve(backend))
    return out


def _check(args: Arguments) -> None:
    embeddings, visual, positions = args.embeddings, args.visual, args.positions
    check_floating("embeddings", embeddings)
    check_floating("visual", visual)
    check_tensor("positions", positions)
    if embeddings.dim() not in (2, 3) or embeddings.shape[-1] == 0:
        raise ValueError(
            f"embeddings must be [B, L, C] or [T, C] with at least one channel, got shape {tuple(embeddings.shape)}"
        )
    channels = embeddings.shape[-1]
    if visual.dim() != 2 or visual.shape[1] != channels:
        hint = "; flatten its images" if visual.dim() == 3 and visual.shape[2] == channels else ""
        raise ValueError(f"visual must be [V, {channels}] as embeddings is, got shape {tuple(visual.shape)}{hint}")
    if visual.dtype != embeddings.dtype:
        raise TypeError(f"visual must have embeddings' dtype {embeddings.dtype}, got {visual.dtype}")
    for name, x in (("visual", visual), ("positions", positions)):
        if x.device != embeddings.device:
            raise ValueError(f"{name} must be on embeddings' device {embeddings.device}, got {x.device}")
    if positions.dtype == torch.bool:
        if positions.shape != embeddings.shape[:-1]:
            hint = "; pass positions[..., 0]" if positions.shape == embeddings.shape else ""
            must = "a mask [B, L] = " if embeddings.dim() == 3 else "a mask [T] = "
            got = f"got shape {tuple(positions.shape)}{hint}"
            raise ValueError(f"positions must be {must}{list(embeddings.shape[:-1])}, {got}")
    elif positions.dtype != torch.int64:
        raise TypeError(f"positions must be int64 or a bool mask, got {positions.dtype}")
    elif positions.dim() != 1 or positions.shape[0] != visual.shape[0]:
        must = f"[V] = [{visual.shape[0]}], one for each row of visual"
        raise ValueError(f"positions must be {must}, got shape {tuple(positions.shape)}")
    if args.mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {args.mode!r}")


def _fake(args: Arguments) -> Tensor:
    return args.embeddings.new_empty(args.embeddings.shape)


def _passes(args: Any) -> Mapping[str, Tensor]:
    return {"embeddings": args.grad_out} if args.mode == "add" else {}


OP = define(
    "scatter_tokens",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("scatter_tokens_cpu"),
        Backend("chunked", reference),  # whose memory is linear already
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=(),
        formula=lambda args: (reference(args),),
        backends=[
            triton_kernel(f"{__name__}.triton", "backward"),
            cpu_kernel("scatter_tokens_backward_cpu"),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        linear=("embeddings", "visual"),
        passes=_passes,
    ),
)
