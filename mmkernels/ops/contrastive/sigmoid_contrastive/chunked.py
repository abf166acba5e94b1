"""The sigmoid loss in plain PyTorch: strips of rows, each against all texts, loss and gradients in one walk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.contrastive.sigmoid_contrastive.spec import kept_dtype
from mmkernels.ops.contrastive.strips import Strips, add_products


def forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Loss, and its gradients by image, text, logit_scale and logit_bias, in `kept_dtype`."""
    strips = Strips(image, text, logit_scale, image_ids, text_ids)
    bias, count = logit_bias.reshape(()).to(strips.dtype), image.shape[0]
    loss, of_scale, of_bias = (torch.zeros((), dtype=strips.dtype, device=image.device) for _ in range(3))
    dtype = kept_dtype(image)
    of_image = strips.image.new_empty(strips.image.shape, dtype=dtype) if needs[0] else None
    of_text = torch.zeros_like(strips.text) if needs[1] else None
    for at in strips:
        dots, query = strips.dots(at, strips.text)
        logits = dots * strips.scale + bias
        positive, _ = strips.pairs(at)
        logits = torch.where(positive, logits, -logits)  # what should be large
        loss -= F.logsigmoid(logits).sum()
        if not any(needs):
            continue
        of_logits = torch.sigmoid(-logits)
        of_logits = torch.where(positive, -of_logits, of_logits)
        of_scale += (of_logits * dots).sum()
        of_bias += of_logits.sum()
        if needs[0] or needs[1]:
            rows = strips.image[at].to(strips.dtype)
            mine = torch.zeros_like(rows)
            add_products(of_logits, query, rows, strips.text, mine, of_text)
            if of_image is not None:
                of_image[at] = (mine * (strips.scale / count)).to(dtype)
    given = (
        None if of_image is None else of_image.reshape(image.shape),
        None if of_text is None else (of_text * (strips.scale / count)).to(dtype),
        (of_scale / count).to(kept_dtype(logit_scale)).reshape(logit_scale.shape) if needs[2] else None,
        (of_bias / count).to(kept_dtype(logit_bias)).reshape(logit_bias.shape) if needs[3] else None,
    )
    return (loss / count, *(image.new_empty(0) if x is None else x for x in given))
