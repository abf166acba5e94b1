"""The sigmoid loss in plain PyTorch: bands of rows, each against all texts; loss and gradients in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.common.kept import kept_dtype
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import Arguments, kept
from mmkernels.ops.contrastive.strips import LogitStrips, add_products


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients in `kept_dtype`."""
    loss, *grads = summed(args, args.image.shape[0], kept_dtype(args.image))
    return (loss, *kept(grads, args))


def summed(args: Any, count: float, dtype: torch.dtype, first_text: int = 0) -> tuple[Any, ...]:
    """Returns the loss of all pairs and its gradients, None where none is kept, all divided by `count`.

    Args:
        args: the record of the op, or of a block.
        dtype: of image's gradient; the others are wide.
        first_text: see `formula.pairs`.
    """
    image, text = args.image, args.text
    strips = LogitStrips(image, text, args.logit_scale, args.image_ids, args.text_ids, first_text=first_text)
    bias = args.logit_bias.reshape(()).to(strips.dtype)
    loss, scale_grad, bias_grad = (torch.zeros((), dtype=strips.dtype, device=image.device) for _ in range(3))
    image_grad = strips.image.new_empty(strips.image.shape, dtype=dtype) if args.keep_image else None
    text_grad = strips.text.new_zeros(strips.text.shape) if args.keep_text else None
    for at in strips:
        dots, winner = strips.dots(at, strips.text)
        logits = dots * strips.scale + bias
        positive = strips.pairs(at).positive
        logits = torch.where(positive, logits, -logits)  # each pair's loss is -logsigmoid of these
        loss -= F.logsigmoid(logits).sum()
        if not args.keep_any:
            continue
        logits_grad = torch.sigmoid(-logits)
        logits_grad = torch.where(positive, -logits_grad, logits_grad)
        scale_grad += (logits_grad * dots).sum()
        bias_grad += logits_grad.sum()
        if args.keep_image or args.keep_text:
            rows = strips.image[at].to(strips.dtype)
            row_grad = torch.zeros_like(rows)
            add_products(logits_grad, winner, rows, strips.text, row_grad, text_grad)
            if image_grad is not None:
                image_grad[at] = (row_grad * (strips.scale / count)).to(dtype)
    return (
        loss / count,
        None if image_grad is None else image_grad.reshape(image.shape),
        None if text_grad is None else text_grad * (strips.scale / count),
        scale_grad / count if args.keep_logit_scale else None,
        bias_grad / count if args.keep_logit_bias else None,
    )
