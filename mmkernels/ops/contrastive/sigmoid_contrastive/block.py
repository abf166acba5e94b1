"""The sigmoid loss of a part of all pairs: this process's images and some texts from anywhere, and its gradients.

The op has no gradient of its own. Text j's partner is image ``first_text + j``, if there is one: without ids the only
positive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.formula import pairs, queries_of, score_gradients
from mmkernels.ops.contrastive.sigmoid_contrastive import chunked
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, Run, define


class BlockArguments(NamedTuple):
    """The record of `sigmoid_contrastive_block`."""

    image: Tensor  # [N, d] or [N, Q, d]
    text: Tensor  # [M, d]
    logit_scale: Tensor  # one element
    logit_bias: Tensor  # one element
    image_ids: Tensor | None  # int64 [N]
    text_ids: Tensor | None  # int64 [M]
    first_text: int
    divisor: float  # of the sums over pairs: the number of images of all blocks
    keep_image: bool  # whether to compute image's gradient
    keep_text: bool
    keep_logit_scale: bool
    keep_logit_bias: bool

    @property
    def keep_any(self) -> bool:
        """Whether any gradient is computed."""
        return self.keep_image or self.keep_text or self.keep_logit_scale or self.keep_logit_bias


class Block(NamedTuple):
    """This block's share of the loss and its gradients, float32 (float64 for float64 features); [0] where not kept."""

    loss: Tensor  # []
    of_image: Tensor  # as image
    of_text: Tensor  # [M, d]
    of_logit_scale: Tensor  # []
    of_logit_bias: Tensor  # []


def reference(args: BlockArguments) -> tuple[Tensor, ...]:
    """Returns `Block` by the naive formula."""
    wide = wide_dtype(args.image)
    image, text = args.image.to(wide), args.text.to(wide)
    best, winner = (queries_of(image) @ text.mT).max(1)  # [N, M]
    scale, bias = (x.reshape(()).to(wide) for x in (args.logit_scale, args.logit_bias))
    positive = pairs(
        args.image_ids, args.text_ids, ignore=False,
        images=slice(0, len(image)), texts=slice(0, len(text)), device=image.device, first_text=args.first_text,
    ).positive  # fmt: skip
    signs = torch.where(positive, 1.0, -1.0).to(wide)
    logits = signs * (scale * best + bias)
    logits_grad = -signs * torch.sigmoid(-logits) / args.divisor
    of_image, of_text = score_gradients(scale * logits_grad, winner, image, text)
    loss = -F.logsigmoid(logits).sum() / args.divisor
    return (loss, *_wanted((of_image, of_text, (logits_grad * best).sum(), logits_grad.sum()), args))


def _chunked(args: BlockArguments) -> tuple[Any, ...]:
    return chunked.summed(args, args.divisor, wide_dtype(args.image), args.first_text)


def _with_results(run: Run) -> Run:
    """Returns a backend whose gradients may be None, with tensors in their place."""

    def block(args: BlockArguments) -> tuple[Tensor, ...]:
        loss, *grads = run(args)
        return (loss, *_wanted(grads, args))

    return block


def _wanted(grads: Any, args: BlockArguments) -> list[Tensor]:
    keep = (args.keep_image, args.keep_text, args.keep_logit_scale, args.keep_logit_bias)
    wide = wide_dtype(args.image)
    return [
        or_empty(x.contiguous() if wanted else None, args.image, wide) for x, wanted in zip(grads, keep, strict=True)
    ]


def _fake(args: BlockArguments) -> tuple[Tensor, ...]:
    image, wide = args.image, wide_dtype(args.image)
    keep = (args.keep_image, args.keep_text, args.keep_logit_scale, args.keep_logit_bias)
    shapes = (image.shape, args.text.shape, (), ())
    grads = (image.new_empty(shape if wanted else (0,), dtype=wide) for shape, wanted in zip(shapes, keep, strict=True))
    return (image.new_empty((), dtype=wide), *grads)


BLOCK = define(
    "sigmoid_contrastive_block",
    BlockArguments,
    Block,
    fake=_fake,
    backends=[
        triton_kernel("mmkernels.ops.contrastive.sigmoid_contrastive.triton", "block", _with_results),
        cpu_kernel("sigmoid_contrastive_block_cpu"),
        Backend("chunked", _with_results(_chunked)),
        Backend("reference", reference),
    ],
)
