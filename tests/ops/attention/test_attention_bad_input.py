"""Bad input to the attention ops: each message names the argument, what it must be and what it got."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmkernels import SpanMask, attention_received, attention_weights, cross_attention, merge_attention

NAN, INF = math.nan, math.inf

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
SPANS = SpanMask.causal(5, 7)
OUT, LSE = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5)
BAD = {
    "query 3-D": ((Q[0], K, V), {}, ValueError, r"query must be 4-D.*got shape \(4, 5, 8\)"),
    "query a list": (([1], K, V), {}, TypeError, "query must be a tensor, got list"),
    "integers": ((Q.long(), K.long(), V.long()), {}, TypeError, "query must be float16.*got torch.int64"),
    "dtypes": ((Q, K.double(), V), {}, TypeError, "key must have query's dtype torch.float32, got torch.float64"),
    "devices": ((Q, K.to("meta"), V), {}, ValueError, "key must be on query's device cpu, got meta"),
    "head dims": ((Q, K[..., :4], V), {}, ValueError, "key must have query's head dim 8"),
    "heads": ((Q[:, :3], K, V), {}, ValueError, "key must have a number of heads that divides query's 3, got 2"),
    "batches": ((torch.cat([Q, Q]), K, V), {}, ValueError, "key must have batch 1 or query's 4"),
    "value length": ((Q, K, V[:, :, :3]), {}, ValueError, r"value must be \[2, 2, 7, Dv\]"),
    "value batch": ((Q, K, V[:1]), {}, ValueError, r"value must be \[2, 2, 7, Dv\]"),
    "no heads": ((Q[:, :0], K, V), {}, ValueError, "query must have at least one head"),
    "no channels": ((Q[..., :0], K[..., :0], V), {}, ValueError, "query must have at least one head and one channel"),
    "mask type": ((Q, K, V, "causal"), {}, TypeError, "mask must be a SpanMask, a bool tensor or None, got str"),
    "float mask": ((Q, K, V, torch.zeros(5, 7)), {}, TypeError, "mask must be bool.*argument bias"),
    "mask shape": ((Q, K, V, torch.ones(5, 6).bool()), {}, ValueError, r"mask must broadcast to .*\[2, 4, 5, 7\]"),
    "mask dims": ((Q, K, V, torch.ones(1, 1, 1, 5, 7).bool()), {}, ValueError, "mask must broadcast"),
    "mask device": (
        (Q, K, V, torch.ones(5, 7, device="meta").bool()),
        {},
        ValueError,
        "mask must be on query's device",
    ),
    "span batch": ((Q, K, V, SpanMask.key_padding([1, 2, 3])), {}, ValueError, "mask must be for batch 1 or 2, got 3"),
    "span queries": ((Q, K, V, SpanMask.causal(4, 7)), {}, ValueError, "mask must be for 1 or 5 queries, got 4"),
    "span keys": (
        (Q, K, V, SpanMask.from_key_mask(torch.ones(2, 6).bool())),
        {},
        ValueError,
        "mask.key_valid must be for 7 keys, got 6",
    ),
    "span device": ((Q, K, V, SPANS.to("meta")), {}, ValueError, "mask must be on query's device cpu, got meta"),
    "bias shape": ((Q, K, V), {"bias": torch.zeros(3, 1, 1, 1)}, ValueError, "bias must broadcast"),
    "bias dtype": ((Q, K, V), {"bias": torch.zeros(5, 7).half()}, TypeError, "bias must be torch.float32"),
    "bias type": ((Q, K, V), {"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "gate shape": ((Q, K, V), {"gate": torch.zeros(3)}, ValueError, r"gate must be a scalar or \[Hq\] = \[4\]"),
    "gate type": ((Q, K, V), {"gate": 0.5}, TypeError, "gate must be a tensor, got float"),
    "gate dtype": ((Q, K, V), {"gate": torch.zeros(4).double()}, TypeError, "gate must be torch.float32"),
    "gate device": ((Q, K, V), {"gate": torch.zeros(4, device="meta")}, ValueError, "gate must be on query's device"),
    "scale NaN": ((Q, K, V), {"scale": NAN}, ValueError, "scale must be a finite number, got nan"),
    "scale infinite": ((Q, K, V), {"scale": INF}, ValueError, "scale must be a finite number"),
    "dropout above 1": ((Q, K, V), {"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    "dropout NaN": ((Q, K, V), {"dropout_p": NAN}, ValueError, "dropout_p must be between 0 and 1"),
}


PARTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "merge 3-D": (lambda: merge_attention(OUT[0], LSE, OUT, LSE), ValueError, r"out_a must be 4-D \[B, H, Lq, Dv\]"),
    "merge shapes": (lambda: merge_attention(OUT, LSE, OUT[:1], LSE), ValueError, "out_b must be"),
    "merge dtypes": (
        lambda: merge_attention(OUT, LSE, OUT.half(), LSE),
        TypeError,
        "out_b must have out_a.s dtype",
    ),
    "merge lse shape": (lambda: merge_attention(OUT, LSE[:1], OUT, LSE), ValueError, "lse_a must be"),
    "merge lse dtype": (lambda: merge_attention(OUT, LSE, OUT, LSE.half()), TypeError, "lse_b must be torch.float32"),
    "merge device": (
        lambda: merge_attention(OUT, LSE, OUT, LSE.to("meta")),
        ValueError,
        "lse_b must be on out_a's device",
    ),
    "merge type": (lambda: merge_attention(OUT, 1.0, OUT, LSE), TypeError, "lse_a must be a tensor, got float"),
    "merge integers": (lambda: merge_attention(OUT.long(), LSE, OUT.long(), LSE), TypeError, "out_a must be float16"),
    "received dims": (lambda: attention_received(Q[0], K), ValueError, "query must be 4-D"),
    "received dtypes": (lambda: attention_received(Q, K.double()), TypeError, "key must have query's dtype"),
    "received mask": (
        lambda: attention_received(Q, K, SpanMask.causal(5, 7).to("meta")),
        ValueError,
        "mask must be on",
    ),
    "received weights": (
        lambda: attention_received(Q, K, query_weights=torch.ones(2, 4)),
        ValueError,
        r"query_weights must be \[1 or 2, 1 or 4, 5\], got shape \(2, 4\)",
    ),
    "received weights int": (
        lambda: attention_received(Q, K, query_weights=torch.ones(1, 1, 5).long()),
        TypeError,
        "query_weights must be floating point",
    ),
    "rows float": (lambda: attention_weights(Q, K, rows=torch.zeros(1)), TypeError, "rows must be int64"),
    "rows high": (
        lambda: attention_weights(Q, K, rows=torch.tensor([0, 5])),
        IndexError,
        "rows must be from 0 to 4, got 0 to 5",
    ),
    "rows negative": (lambda: attention_weights(Q, K, rows=torch.tensor([-1])), IndexError, "got -1"),
    "rows shape": (lambda: attention_weights(Q, K, rows=torch.zeros(3, 1).long()), ValueError, r"rows must be \[R\]"),
    "rows list": (lambda: attention_weights(Q, K, rows=[0]), TypeError, "rows must be a tensor, got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_to_cross_attention(name: str) -> None:
    args, kwargs, error, message = BAD[name]
    with pytest.raises(error, match=message):
        cross_attention(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARTS)
def test_bad_input_to_the_other_ops(name: str) -> None:
    call, error, message = PARTS[name]
    with pytest.raises(error, match=message):
        call()
