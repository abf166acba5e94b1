"""The Triton kernels' memory: nothing read or written outside, everything written, nothing copied; grids and strides.

As test_triton.py, under Triton's interpreter or on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import generator
from layouts import embedded, guarded
from torch import Tensor

from mmkernels import SpanMask, cross_attention
from mmkernels.ops.attention.attention_received.spec import Arguments as ReceivedArguments
from mmkernels.ops.attention.attention_weights.spec import Arguments as Scores
from mmkernels.ops.attention.cross_attention.spec import Arguments, Results
from mmkernels.ops.common.cases import normal
from mmkernels.runtime import triton as gpu
from mmkernels.runtime.arguments import lay_out, lay_out_backward
from mmkernels.runtime.tuning import Config

pytest.importorskip("triton")

from triton_tiling import DEVICE, tiled

from mmkernels.ops.attention.attention_received import triton as received
from mmkernels.ops.attention.cross_attention.triton import backward, forward
from mmkernels.ops.attention.triton import call as triton_call
from mmkernels.ops.attention.triton.arguments import Layout

BACKWARD = lay_out_backward("cross_attention", lay_out(Arguments), lay_out(Results), ("out", "lse")).record

interpreted = pytest.mark.interpreted  # and else on a GPU, or not at all
if not gpu.INTERPRETED:
    pytestmark = pytest.mark.gpu


@interpreted
@pytest.mark.parametrize("kind", ["none", "spans", "dense", "bias", "everything"])
def test_nothing_outside_is_read_or_written_and_all_inside_is(kind: str) -> None:
    g = generator(1)
    mask = {"spans": SpanMask.causal(21, 37), "dense": torch.rand(2, 2, 21, 37, generator=g) < 0.5}.get(kind)
    bias = normal(g, 1, 2, 21, 37) if kind in ("bias", "everything") else None
    gate = normal(g, 2) if kind == "everything" else None
    seed = torch.tensor([5], device=DEVICE) if kind == "everything" else None
    shapes = ((2, 2, 21, 24), (2, 1, 37, 24), (2, 1, 37, 40))
    plain = [normal(g, *shape).to(DEVICE, torch.float32) for shape in shapes]
    grad = normal(g, 2, 2, 21, 40).to(DEVICE, torch.float32)
    more = [None if x is None else x.to(DEVICE, torch.float32) for x in (bias, gate)]

    def run(wrap: Any) -> list[Tensor]:
        query, key, value, grad_out = (wrap(x) for x in (*plain, grad))
        wrapped = [None if x is None else wrap(x) for x in more]
        masks: Any = (None, None, None, None)
        if isinstance(mask, SpanMask):
            masks = (mask.start.to(DEVICE), mask.end.to(DEVICE), None, None)
        elif mask is not None:
            masks = (None, None, None, mask.to(DEVICE))
        args = Arguments(query, key, value, *masks, *wrapped, seed, scale=0.3, dropout_p=0.25)
        out, lse = forward.forward(args)
        needs = [True, True, True, bias is not None, gate is not None]
        grads = backward.backward(BACKWARD(*args, out, lse, grad_out, None, *needs))
        extra = received.forward(ReceivedArguments(query, key, *masks, wrapped[0], None, 0.3))
        return [out, lse, *(x for x, need in zip(grads, needs, strict=True) if need), extra]

    with tiled(16, 32, listed=0):
        want = [x.clone() for x in run(lambda x: x)]
        with guarded() as made:
            got = run(embedded)
            assert made
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert all(tensor.intact() for tensor in made)


@interpreted
def test_shared_and_grouped_keys_are_not_copied() -> None:
    query = torch.randn(3, 4, 5, 16, device=DEVICE)
    key, value = (torch.randn(1, 2, 40, 16, device=DEVICE) for _ in range(2))
    with gpu.recorded() as launches:
        cross_attention(query, key, value, backend="triton")
        out = torch.empty(3, 5, 4, 16, device=DEVICE).transpose(1, 2)
        lse = torch.empty(3, 4, 5, device=DEVICE)
        args = Arguments(query, key, value, *(None,) * 7, scale=0.5, dropout_p=0.0)
        backward.backward(BACKWARD(*args, out, lse, out, None, True, True, True, False, False))
    assert len(launches) == 3
    for launch in launches:
        assert launch.args[1] is key and launch.args[2] is value
        assert launch.constants["LAYOUT"] == Layout(group=2, packed=True, shared=True)
    assert launches[0].grid == (2, 1)  # two key heads; 3 batches x 2 heads x 5 queries fill one tile


@interpreted
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "key_batch", "q_len", "problems", "rows"),
    [(2, 4, 4, 2, 300, 8, 300), (2, 4, 2, 2, 300, 4, 600), (3, 4, 2, 1, 300, 2, 1800), (1, 1, 1, 1, 1, 1, 1)],
)
def test_grids(batch: int, heads: int, key_heads: int, key_batch: int, q_len: int, problems: int, rows: int) -> None:
    query, key = torch.empty(batch, heads, q_len, 16), torch.empty(key_batch, key_heads, 70, 16)
    args = Scores(query, key, None, None, None, None, None, 1.0)
    call = triton_call.Call(args)
    assert (call.problems, call.rows) == (problems, rows)
    plan = Config(128, 64, 4, 1)
    assert call.row_tiles(plan) == -(-rows // 128) and call.key_tiles(plan) == 2
    alone = triton_call.Call(args, packed=False, shared=False)
    assert (alone.problems, alone.rows) == (batch * heads, q_len)
    assert triton_call.strides_of(key).batch == (0 if key_batch == 1 else key.stride(0))


@interpreted
def test_strides_of_broadcast_masks_are_0() -> None:
    query, key = torch.empty(2, 4, 5, 16), torch.empty(2, 4, 7, 16)
    mask, bias = torch.ones(1, 4, 1, 7, dtype=torch.bool), torch.empty(2, 1, 5, 1)
    start, end, valid = torch.zeros(1, 5).int(), torch.zeros(2, 1).int(), torch.ones(1, 7).bool()
    call = triton_call.Call(Scores(query, key, start, end, valid, mask, bias, 1.0))
    strides = call.masks[5:]
    assert strides == (0, 1, 1, 0, 0, 1, 0, 7, 0, 1, 5, 0, 1, 0)  # of start, end, key_valid, dense, bias
