"""The sigmoid loss in plain PyTorch: bands of rows, each against all texts; loss and gradients in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.contrastive.sigmoid_contrastive.spec import kept_dtype
from mmkernels.ops.contrastive.strips import LogitStrips, add_products


def forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients by image, text, logit_scale and logit_bias, in `kept_dtype`."""
    need_image, need_text, need_scale, need_bias = needs
    strips = LogitStrips(image, text, logit_scale, image_ids, text_ids)
    bias, count = logit_bias.reshape(()).to(strips.dtype), image.shape[0]
    loss, scale_grad, bias_grad = (torch.zeros((), dtype=strips.dtype, device=image.device) for _ in range(3))
    dtype = kept_dtype(image)
    image_grad = strips.image.new_empty(strips.image.shape, dtype=dtype) if need_image else None
    text_grad = torch.zeros_like(strips.text) if need_text else None
    for at in strips:
        dots, winner = strips.dots(at, strips.text)
        logits = dots * strips.scale + bias
        positive = strips.pairs(at).positive
        logits = torch.where(positive, logits, -logits)  # each pair's loss is -logsigmoid of these
        loss -= F.logsigmoid(logits).sum()
        if not any(needs):
            continue
        logits_grad = torch.sigmoid(-logits)
        logits_grad = torch.where(positive, -logits_grad, logits_grad)
        scale_grad += (logits_grad * dots).sum()
        bias_grad += logits_grad.sum()
        if need_image or need_text:
            rows = strips.image[at].to(strips.dtype)
            row_grad = torch.zeros_like(rows)
            add_products(logits_grad, winner, rows, strips.text, row_grad, text_grad)
            if image_grad is not None:
                image_grad[at] = (row_grad * (strips.scale / count)).to(dtype)
    grads = (
        None if image_grad is None else image_grad.reshape(image.shape),
        None if text_grad is None else (text_grad * (strips.scale / count)).to(dtype),
        (scale_grad / count).to(kept_dtype(logit_scale)).reshape(logit_scale.shape) if need_scale else None,
        (bias_grad / count).to(kept_dtype(logit_bias)).reshape(logit_bias.shape) if need_bias else None,
    )
    return (loss / count, *(image.new_empty(0) if x is None else x for x in grads))
