"""A block of the contrastive loss in Triton, by the kernels of the whole.

The kernels multiply a dot by the scale's base-2 factor as float32 rounds it, once. In a loss over all blocks, whose
target is exact, that would shift each logit by up to 1e-5 at a logit of 100; the sums are shifted back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.formula import LOG2E
from mmkernels.ops.contrastive.info_nce.reduction import REFERENCE, SUM
from mmkernels.ops.contrastive.info_nce.triton.backward import gradients
from mmkernels.ops.contrastive.info_nce.triton.forward import OP, add_best, add_block
from mmkernels.ops.contrastive.info_nce.triton.states import Best, DirectionState, Fields
from mmkernels.ops.contrastive.triton.call import Block, Pairing, Partners, pairing
from mmkernels.ops.contrastive.triton.tiles import LARGE

_INT32 = 2**31
_TINY = 1e-30  # a scale of which nothing is left to shift


def best(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.Best`: a score is a dot times the scale, in the kernels' unit."""
    block = _block(args, "contrastive", _partners(args))
    images, texts = (
        DirectionState(n, args.image, Fields.of(positive=False, all=False, before=True), None)
        for n in (block.rows, block.columns)
    )
    add_best(block, images, texts, args.logit_scale)
    assert images.best is not None and texts.best is not None
    return *_wide(images.best), *_wide(texts.best)


def block(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.Block`."""
    partners, ranks = _partners(args), args.image_best is not None
    block = _block(args, "contrastive", partners)
    n, m, pairs = block.rows, block.columns, block.pairing
    fields = Fields.of(positive=pairs.kind == "code", all=args.smooth, before=ranks)
    # Of the pairs on the diagonal; images without one keep 0.
    positive_dots = None if fields.positive else args.image.new_zeros(n, dtype=torch.float32)
    images, texts = (DirectionState(x, args.image, fields, positive_dots) for x in (n, m))
    if ranks:
        images.best = _narrow(args.image_best, args.image_index)
        texts.best = _narrow(args.text_best, args.text_index)
    add_block(block, images, texts, args.logit_scale, positive_dots)
    if positive_dots is not None:
        of_texts = torch.zeros_like(texts.state[SUM])
        of_texts[partners.texts] = positive_dots[partners.images]
        texts.sums = texts.sums._replace(positive=of_texts)
    shift, sign = _shift(args.logit_scale), torch.where(args.logit_scale.reshape(()) < 0, -1.0, 1.0)
    of_images = _sums(images, pairs, 0, m, partners.images, shift, sign)
    of_texts = _sums(texts, pairs, 1, n, partners.texts, shift, sign)
    counts = (x.sums.before for x in (images, texts))
    before = (or_empty(None if x is None else x.to(torch.int64), args.image, torch.int64) for x in counts)
    return (of_images, of_texts, *before)


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.BlockGradients`."""
    block, shift = _block(args, "contrastive_grad", _partners(args)), _shift(args.logit_scale)
    image_state, text_state = (_shifted(state, -shift) for state in (args.image_state, args.text_state))
    of_image, (of_text,), of_scale = gradients(args, [block], [args.need_text], image_state, text_state, torch.float32)
    found = (of_image, of_text, of_scale.reshape(()) if args.need_logit_scale else None)
    return tuple(or_empty(x, of_scale) for x in found)


def _partners(args: Any) -> Partners:
    return Partners.of(args.first_text, len(args.image), len(args.text))


def _block(args: Any, kernel: str, partners: Partners) -> Block:
    pairs = pairing(args.image_ids, args.text_ids, args.ignore, partners)
    return Block(OP, kernel, args.image, args.text, pairs)


def _wide(best: Best) -> tuple[Tensor, Tensor]:
    """Returns best positives as the op does. Where there is none the kernels leave any index."""
    return best.score, torch.where(best.score == -torch.inf, 0, best.index.to(torch.int64))


def _narrow(score: Tensor, index: Tensor) -> Best:
    """Returns best positives as the kernels take them; an index outside of the block keeps its order."""
    return Best(score.contiguous(), index.clamp(-_INT32, _INT32 - 1).to(torch.int32))


def _sums(
    rows: DirectionState, pairs: Pairing, direction: int, columns: int, partners: slice, shift: Tensor, sign: Tensor
) -> Tensor:
    """Returns one direction's sums [6, rows], see `merging.POSITIVE_DOTS`.

    Args:
        direction: 0: of images; 1: of texts.
        partners: the rows that have one.
        sign: of the scale, which the kernels' dots were multiplied by.
    """
    sums = rows.state.new_zeros(6, rows.rows)
    sums[:2] = _shifted(rows.state, shift)[:2]
    positives, hidden = pairs.positives[direction], pairs.hidden[direction]
    if positives is None:
        sums[2, partners] = 1.0
    else:
        sums[2] = positives
    sums[3] = columns if hidden is None else columns - hidden
    sums[4] = rows.sums.positive * sign
    if rows.sums.all is not None:
        sums[5] = rows.sums.all * sign
    return sums


def _shift(logit_scale: Tensor) -> Tensor:
    """Returns by how much a logit is larger than the kernels', per unit of it; float64, 0-D."""
    exact, kernels = logit_scale.reshape(()).double() * LOG2E, logit_scale.reshape(()).float() * LOG2E
    return torch.where(kernels.abs() < _TINY, 0.0, exact / kernels.double() - 1.0)


def _shifted(state: Tensor, shift: Tensor) -> Tensor:
    """Returns a state whose sums are those of logits that are larger by `shift` per unit of the rows' log-sum-exp.

    From `LARGE` on the kernels round each logit, and nothing is shifted.
    """
    total = state[SUM].double()
    size = state[REFERENCE].double() + total.log2()
    state = state.clone()
    state[SUM] = torch.where(size.abs() < LARGE.value, total * torch.exp2(shift * size), total)
    return state
