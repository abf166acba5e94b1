"""Merges two attention outputs by one multiplication and one multiply-add in place."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.merge_attention.spec import Arguments


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns the merged output and its log-sum-exp."""
    out_a, lse_a, out_b, lse_b = args.out_a, args.lse_a, args.out_b, args.lse_b
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = ((x - base).exp_()[..., None] for x in (lse_a, lse_b))
    batch, heads, q_len, dim = out_a.shape
    out = out_a.new_empty(batch, q_len, heads, dim).transpose(1, 2)
    if out.dtype == lse.dtype:
        torch.mul(out_a, weight_a, out=out)
        return out.addcmul_(out_b, weight_b), lse
    return out.copy_(torch.mul(out_a, weight_a).addcmul_(out_b.to(lse.dtype), weight_b)), lse
