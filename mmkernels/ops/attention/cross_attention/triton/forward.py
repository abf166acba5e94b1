"""Cross-attention's forward pass in Triton."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops.attention.cross_attention.spec import Arguments
from mmkernels.ops.attention.triton.attend import attend
from mmkernels.ops.attention.triton.call import Call


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and the log-sum-exp [B, Hq, Lq]."""
    call = Call(args)
    out = args.query.new_empty(call.batch, call.q_len, call.heads, args.value.shape[3]).transpose(1, 2)
    return out, attend(call, args.value, out, args.gate, args.seed, args.dropout_p)
