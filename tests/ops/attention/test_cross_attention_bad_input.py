"""Bad input to cross-attention: each message names the argument, what it must be and what it got."""

from __future__ import annotations

import math

import pytest
import torch

from mmkernels import SpanMask, cross_attention

NAN, INF = math.nan, math.inf

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
SPANS = SpanMask.causal(5, 7)
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


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    args, kwargs, error, message = BAD[name]
    with pytest.raises(error, match=message):
        cross_attention(*args, **kwargs)  # type: ignore[arg-type]
