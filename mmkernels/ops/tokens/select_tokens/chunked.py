"""Selecting in plain PyTorch: as the reference, with similarities in strips of tokens."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mmkernels.ops.tokens.ranking import best, image_of, starts_of
from mmkernels.ops.tokens.select_tokens.spec import Arguments, nearest, operands, results

STRIP_BYTES = 8 << 20
"""Of the similarities that are held at once."""


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns all results."""
    index = best(args.scores, args.lengths, args.keep, args.over)
    if not args.merge:
        return results(args, index, None)
    metric, kept = operands(args, index)
    owner = image_of(args.lengths, index.device)[index]
    starts = starts_of(args.lengths)
    kept_starts = starts_of(args.keep) if args.over == "image" else (0,) * len(args.lengths) + (len(index),)
    place = index.new_empty(len(metric))
    for image, (first, last) in enumerate(pairwise(starts)):
        at = slice(kept_starts[image], kept_starts[image + 1]) if args.over == "image" else slice(None)
        step = max(1, STRIP_BYTES // (metric.itemsize * max(1, len(kept[at]))))
        for row in range(first, last, step):
            rows = slice(row, min(last, row + step))
            similarity = (metric[rows] @ kept[at].mT).nan_to_num_(nan=torch.finfo(kept.dtype).min)
            found = nearest(similarity.masked_fill_(owner[at] != image, -torch.inf))
            place[rows] = torch.where(found < 0, found, found + (at.start or 0))
    return results(args, index, place)
