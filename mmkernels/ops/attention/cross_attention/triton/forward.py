"""Cross-attention's forward pass in Triton."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops.attention.triton.attend import attend
from mmkernels.ops.attention.triton.call import Call


def forward(
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B or 1, Hkv, Lk, D]
    value: Tensor,  # [B or 1, Hkv, Lk, Dv]
    start: Tensor | None,
    end: Tensor | None,
    key_valid: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Out [B, Hq, Lq, Dv] and log-sum-exp [B, Hq, Lq]."""
    call = Call(query, key, start, end, key_valid, dense, bias, scale)
    out = query.new_empty(call.batch, call.q_len, call.heads, value.shape[3]).transpose(1, 2)
    return out, attend(call, value, out, gate, seed, dropout_p)
