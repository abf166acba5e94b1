"""Merging in one multiplication and one in-place multiply-add."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merged output and log-sum-exp."""
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = ((x - base).exp_()[..., None] for x in (lse_a, lse_b))
    batch, heads, q_len, dim = out_a.shape
    out = out_a.new_empty(batch, q_len, heads, dim).transpose(1, 2)
    if out.dtype == lse.dtype:
        torch.mul(out_a, weight_a, out=out)
        return out.addcmul_(out_b, weight_b), lse
    return out.copy_(torch.mul(out_a, weight_a).addcmul_(out_b.to(lse.dtype), weight_b)), lse
