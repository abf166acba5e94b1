"""The sigmoid loss in plain PyTorch: strips of rows, each against all texts, loss and gradients in one walk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.contrastive.sigmoid_contrastive.spec import Arguments, kept, kept_dtype
from mmkernels.ops.contrastive.strips import Strips, add_products


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients in `kept_dtype`."""
    image, text, logit_scale, logit_bias = args.image, args.text, args.logit_scale, args.logit_bias
    strips = Strips(image, text, logit_scale, args.image_ids, args.text_ids)
    bias, count = logit_bias.reshape(()).to(strips.dtype), image.shape[0]
    loss, of_scale, of_bias = (torch.zeros((), dtype=strips.dtype, device=image.device) for _ in range(3))
    dtype = kept_dtype(image)
    of_image = strips.image.new_empty(strips.image.shape, dtype=dtype) if args.keep_image else None
    of_text = torch.zeros_like(strips.text) if args.keep_text else None
    for at in strips:
        dots, query = strips.dots(at, strips.text)
        logits = dots * strips.scale + bias
        positive, _ = strips.pairs(at)
        logits = torch.where(positive, logits, -logits)  # what should be large
        loss -= F.logsigmoid(logits).sum()
        if not args.keep_any:
            continue
        of_logits = torch.sigmoid(-logits)
        of_logits = torch.where(positive, -of_logits, of_logits)
        of_scale += (of_logits * dots).sum()
        of_bias += of_logits.sum()
        if args.keep_image or args.keep_text:
            rows = strips.image[at].to(strips.dtype)
            mine = torch.zeros_like(rows)
            add_products(of_logits, query, rows, strips.text, mine, of_text)
            if of_image is not None:
                of_image[at] = (mine * (strips.scale / count)).to(dtype)
    grads = (
        of_image,
        None if of_text is None else of_text * (strips.scale / count),
        of_scale / count,
        of_bias / count,
    )
    return (loss / count, *kept(grads, args))
