"""The Triton kernels beyond the specs' cases: tiles, lists of tiles, splits, head dims, what is not finite.

They run under Triton's interpreter (``TRITON_INTERPRET=1``), or on a GPU where there is one.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from harness import SPECS, check, cotangent, draw, examples, generator
from hypothesis import given
from hypothesis import strategies as st
from pairwise import parametrize, traits

from mmkernels import BackendError, SpanMask, attention_received, attention_weights, cross_attention
from mmkernels.ops import MODULES
from mmkernels.ops.attention.attention_weights.spec import Arguments
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.runtime.tuning import Config
from mmkernels.spec import Case, OpSpec, cast

pytest.importorskip("triton")

from triton_tiling import DEVICE, tiled

from mmkernels.ops.attention.cross_attention.triton import backward
from mmkernels.ops.attention.triton import attend
from mmkernels.ops.attention.triton import call as triton_call

interpreted = pytest.mark.interpreted  # and else on a GPU, or not at all
if not gpu.INTERPRETED:
    pytestmark = pytest.mark.gpu

OP = "cross_attention"
NAN, INF = math.nan, math.inf


def _check(make: Any, *grads: str, op: str = OP, seeded: bool = False) -> None:
    check(SPECS[op], Case("here", make, grads, seeded), torch.float32, "triton", DEVICE)


ALL = ("query", "key", "value")

# Tiles and lists.


def _cases() -> list[tuple[OpSpec, Case]]:
    """The specs' cases in which something is hidden, split, shared or biased; co-attention's are large enough as is."""
    return [
        (spec, case)
        for spec in SPECS.values()
        if ".attention." in MODULES[spec.name] and spec.name not in ("merge_attention", "co_attention")
        for case in spec.cases
        if case.id != "many tiles" and {"mask", "bias", "gate", "query_weights"} & set(draw(case))
    ]


@interpreted
@parametrize(
    "spec, case",
    _cases(),
    lambda row: {"op": row[0].name} | traits(draw(row[1])),
    ids=lambda row: f"{row[0].name}-{row[1].id}".replace(" ", "_"),
)
def test_lists_of_small_tiles(spec: OpSpec, case: Case) -> None:
    """The least tiles, and lists of them however small the mask is."""
    with tiled(16, 16, listed=0):
        check(spec, case, torch.float32, "triton", DEVICE)


def _blocks(g: torch.Generator, heads: int = 1) -> dict[str, Any]:
    """A dense mask with tiles that are hidden, that are visible, and with holes; a row that sees nothing."""
    inputs = attention_inputs(g, 2, 2, 40, 56, 16, key_heads=1)
    mask = torch.rand(2, heads, 40, 56, generator=g) < 0.5
    mask[:, :, :32, 16:48] = False
    mask[:, :, 16:, 32:48] = True
    mask[1, :, 5] = False
    mask[0, 0, 32:] = False
    return inputs | {"mask": mask}


@interpreted
@pytest.mark.parametrize("listed", [0, 2**30], ids=["lists", "ranges"])
@pytest.mark.parametrize("heads", [1, 2])
def test_dense_masks_by_lists_and_by_ranges(listed: int, heads: int) -> None:
    with tiled(16, 16, listed):
        _check(lambda g: _blocks(g, heads), *ALL)
        _check(lambda g: {k: v for k, v in _blocks(g, heads).items() if k != "value"}, op="attention_received")


@interpreted
@pytest.mark.parametrize("listed", [0, 2**30], ids=["lists", "ranges"])
@pytest.mark.parametrize(
    "mask",
    [
        SpanMask.causal(40, 72),
        SpanMask.window(20, 5, 40, 72),
        SpanMask.key_padding([72, 33]),
        SpanMask.key_padding([64, 0]) & SpanMask.causal(40, 72),
        SpanMask.media((torch.arange(40) // 6)[None], 11),
        SpanMask.from_key_mask(torch.arange(144).reshape(2, 72) % 7 > 0) & SpanMask.causal(40, 72),
    ],
    ids=["causal", "window", "padding", "padding, causal", "media", "holes, causal"],
)
def test_spans_by_lists_and_by_ranges(mask: SpanMask, listed: int) -> None:
    with tiled(16, 32, listed):
        _check(lambda g: attention_inputs(g, 2, 2, 40, 72, 16, key_heads=1) | {"mask": mask}, *ALL)


@interpreted
def test_lists_say_which_tiles_are_visible() -> None:
    query, key = torch.empty(2, 2, 40, 16, device=DEVICE), torch.empty(2, 1, 56, 16, device=DEVICE)
    dense = _blocks(generator(), heads=2)["mask"].to(DEVICE)
    call = triton_call.Call(Arguments(query, key, None, None, None, dense, None, 1.0), packed=False)
    for of_rows in (True, False):
        tiles, counts, *strides = call.make_lists(Config(16, 16, 4, 1), of_rows=of_rows)
        assert strides == [2 * tiles.shape[1], tiles.shape[1]] and tiles.shape == (4, *((3, 4) if of_rows else (4, 3)))
        for entry, line in itertools.product(range(4), range(tiles.shape[1])):
            mask = dense[entry // 2, entry % 2]
            status = {"partial": set(), "full": set()}
            for other in range(tiles.shape[2]):
                row, column = (line, other) if of_rows else (other, line)
                part = mask[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                if part.any():
                    status["full" if bool(part.all()) and part.shape[1] == 16 else "partial"].add(other)
            partial, full = counts[entry, line].tolist()
            length = tiles.shape[2]
            assert set(tiles[entry, line, :partial].tolist()) == status["partial"]
            assert set(tiles[entry, line, length - full :].tolist()) == status["full"]


# Splits of the keys, and of the rows in the backward pass.

KEYS = 180


@interpreted
@pytest.mark.parametrize("shape", [(1, 8, 2, 1), (3, 4, 4, 1), (2, 6, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["none", "spans", "valid", "dense", "bias"])
def test_decoding_splits_the_keys(shape: tuple[int, int, int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, key_heads, q_len = shape
    monkeypatch.setattr(attend, "multiprocessors", lambda device: 100)

    def make(g: torch.Generator) -> dict[str, Any]:
        inputs = attention_inputs(g, batch, heads, q_len, KEYS, 16, key_heads=key_heads) | {"return_lse": True}
        if kind == "spans":  # a split that is hidden, and a sequence without keys
            inputs["mask"] = SpanMask.key_padding([KEYS, 0, 80][:batch])
        elif kind == "valid":
            inputs["mask"] = SpanMask.from_key_mask(torch.rand(batch, KEYS, generator=g) < 0.3)
        elif kind == "dense":
            inputs["mask"] = torch.rand(batch, heads, q_len, KEYS, generator=g) < 0.3
        elif kind == "bias":
            inputs["bias"] = normal(g, 1, heads, q_len, KEYS).masked_fill(torch.rand(KEYS, generator=g) < 0.3, -INF)
        return inputs | {"gate": normal(g, heads)}

    with tuning.use_config(OP, "decode", Config(16, 32, 4, 1)):
        with gpu.recorded() as launches:
            cross_attention(**cast(make(generator()), torch.float32, DEVICE), backend="triton")
        assert [x.kernel.__name__ for x in launches] == ["forward_kernel", "merge_splits"]
        assert launches[0].grid[1] == 3  # 6 tiles of keys, 2 at least in a split
        _check(make)


@interpreted
@pytest.mark.parametrize("shared", [False, True])
def test_the_backward_pass_splits_the_rows(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "multiprocessors", lambda device: 100)

    def make(g: torch.Generator) -> dict[str, Any]:
        inputs = attention_inputs(g, 2, 2, 140, 20, 16, key_batch=1 if shared else 2, key_heads=1)
        return inputs | {"mask": SpanMask.media((torch.arange(140) // 20)[None], 3), "bias": normal(g, 20)}

    with tiled(16, 32):
        _check(make, *ALL, "bias")


@interpreted
@parametrize(
    "batch, heads, q_len, k_len",
    list(itertools.product((1, 2), (1, 4), (1, 70), (1, 40))),
    ids=lambda row: "x".join(map(str, row)),
)
def test_the_bias_gradient_for_every_way_to_share_it(batch: int, heads: int, q_len: int, k_len: int) -> None:
    shape = (batch, heads, q_len, k_len)

    def make(g: torch.Generator) -> dict[str, Any]:
        inputs = attention_inputs(g, 2, 4, 70, 40, 8, key_heads=2) | {"mask": SpanMask.causal(70, 40)}
        return inputs | {"bias": normal(g, *shape), "return_lse": True}

    with tiled(32, 32):
        _check(make, "bias")


# Head dims, dtypes, options.


@interpreted
@pytest.mark.parametrize(("dim", "value_dim"), [(40, 40), (72, 72), (80, 80), (96, 96), (160, 160), (24, 72), (80, 8)])
def test_head_dims_that_are_no_powers_of_two(dim: int, value_dim: int) -> None:
    def make(g: torch.Generator) -> dict[str, Any]:
        inputs = attention_inputs(g, 1, 2, 20, 40, dim, value_dim=value_dim)
        return inputs | {"mask": SpanMask.causal(20, 40), "gate": normal(g, 2), "bias": normal(g, 40)}

    with tiled(16, 32):
        _check(make, *ALL, "gate", "bias")


@pytest.mark.parametrize(
    ("dim", "widths"),
    [(1, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)),
     (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
@interpreted
def test_the_widths_of_head_dims(dim: int, widths: tuple[int, int]) -> None:
    assert triton_call.head_dim(dim) == (dim, *widths)
    assert sum(widths) >= dim and sum(widths) <= max(16, 1.34 * dim)


@interpreted
def test_the_copy_engines_path() -> None:
    """Descriptors of strided keys and values, with batch and heads to step over and a last tile that hangs over."""
    buffer = normal(generator(), 2, 1100, 2, 2, 16)
    key, value = (buffer[:, :, n].transpose(1, 2) for n in range(2))

    def make(g: torch.Generator) -> dict[str, Any]:
        query = normal(g, 2, 2, 40, 16)
        return {"query": query, "key": key, "value": value, "mask": SpanMask.key_padding([1100, 1030])}

    with tiled(16, 64):
        inputs = cast(make(generator()), torch.float32, DEVICE)
        with gpu.recorded() as launches:
            cross_attention(**inputs, backend="triton")
        if tuning.architecture(torch.device(DEVICE)) in ("sm_90", "sm_100"):
            descriptor = launches[0].args[1]
            assert launches[0].constants["TMA"] and descriptor.block_shape == [1, 1, 64, 16]
            assert descriptor.strides == list(inputs["key"].stride()) and descriptor.base is inputs["key"]
        _check(make, *ALL)


@interpreted
def test_where_a_descriptor_cannot_be() -> None:
    x = torch.zeros(1, 2, 8, 16, device=DEVICE)
    with tuning.pretend("sm_90"):
        assert triton_call.tma_descriptor(x, 8) is not None
        assert triton_call.tma_descriptor(x[..., ::2], 8) is None
        assert triton_call.tma_descriptor(torch.zeros(1, 2, 8, 40, device=DEVICE), 8) is None
        assert triton_call.tma_descriptor(torch.zeros(257, device=DEVICE)[1:].view(1, 2, 8, 16), 8) is None
        assert triton_call.tma_descriptor(torch.zeros(1, 2, 8, 17, device=DEVICE)[..., :16], 8) is None
        assert triton_call.tma_descriptor(x.expand(3, -1, -1, -1), 8) is None
    with tuning.pretend("sm_80"):
        assert triton_call.tma_descriptor(x, 8) is None


# What is not finite.


@interpreted
@pytest.mark.parametrize("listed", [0, 2**30], ids=["lists", "ranges"])
@pytest.mark.parametrize(("k_len", "bad", "mask"), [
    (20, 16, None), (40, 32, SpanMask.key_padding([40])), (40, 16, SpanMask.causal(5, 40)), (256, 128, None),
])  # fmt: skip
def test_whole_tiles_of_nan_keys_make_a_row_nan(
    k_len: int, bad: int, mask: SpanMask | None, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attend, "multiprocessors", lambda device: 100)
    query, key = torch.randn(1, 1, 5, 8, device=DEVICE), torch.randn(1, 1, k_len, 8, device=DEVICE)
    key[:, :, :bad] = NAN
    mask = None if mask is None else mask.to(DEVICE)
    with tiled(16, 16, listed), tuning.use_config(OP, "decode", Config(16, 16, 4, 1)):
        out, lse = cross_attention(query, key, key, mask, return_lse=True, backend="triton")
        weights = attention_weights(query, key, mask, backend="triton")
    assert bool(out.isnan().all()) and bool(lse.isnan().all())
    visible = torch.ones(1, 5, k_len, dtype=torch.bool) if mask is None else mask.to_dense(k_len)[:, 0].cpu()
    torch.testing.assert_close(weights[:, 0].isnan().cpu(), visible.expand(1, 5, k_len))


# What can't run, and what is chosen.


@interpreted
def test_why_not() -> None:
    x = torch.zeros(1, 1, 1, 8, device=DEVICE)
    why_not = gpu.why_not_of("attention_weights")
    for bad, message in (
        (x.double(), "float64 is not computed"),
        (torch.zeros(1, 1, 1, 264, device=DEVICE), "head dims above 256 do not fit"),
        (x.to("meta"), "the tensors are on meta"),
    ):
        reason = why_not(Arguments(bad, bad, *(None,) * 5, scale=1.0))
        assert reason is not None and message in reason
    assert why_not(Arguments(x, x, *(None,) * 5, scale=1.0)) is None and why_not() is None
    with pytest.raises(BackendError, match=r"triton: torch\.float64 is not computed"):
        cross_attention(x.double(), x.double(), x.double(), backend="triton")


@interpreted
@examples(3, interpreted=8)  # on a GPU each compiles its own kernels
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    sizes = st.integers(1, 40)
    batch, group, key_heads = (data.draw(st.integers(1, 2)) for _ in range(3))
    q_len, k_len, dim, value_dim = (data.draw(sizes) for _ in range(4))
    kind = data.draw(st.sampled_from(["none", "spans", "valid", "dense"]))
    key_batch = data.draw(st.sampled_from([1, batch]))
    heads = group * key_heads
    bias = (
        [data.draw(st.sampled_from([1, n])) for n in (batch, heads, q_len, k_len)] if data.draw(st.booleans()) else []
    )

    def make(g: torch.Generator) -> dict[str, Any]:
        inputs = attention_inputs(
            g, batch, heads, q_len, k_len, dim, key_heads=key_heads, value_dim=value_dim, key_batch=key_batch
        )
        if kind == "spans":
            bounds = [torch.randint(-2, k_len + 3, (batch, q_len), generator=g).int() for _ in range(2)]
            inputs["mask"] = SpanMask(*bounds)
        elif kind == "valid":
            inputs["mask"] = SpanMask.from_key_mask(torch.rand(batch, k_len, generator=g) < 0.5)
        elif kind == "dense":
            inputs["mask"] = torch.rand(batch, heads, q_len, k_len, generator=g) < 0.5
        return inputs | ({"bias": normal(g, *bias)} if bias else {})

    case = Case(f"values {data.draw(st.integers(0, 1000))}", make, (*ALL, "bias") if bias else ALL)
    with tiled(16, 16, data.draw(st.sampled_from([0, 2**30]))):
        check(SPECS[OP], case, torch.float32, "triton", DEVICE, units=_units(draw(case)))


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _units(inputs: dict[str, Any]) -> dict[str, float]:
    """The size of the terms that the gradients of scores are sums of: of a key that is seen alone they cancel.

    The gradient of a score is P (dO V^T - sum(O dO)); the size of a sum is the root of the sum of its squared terms.
    """
    heads, dim = inputs["query"].shape[1], inputs["query"].shape[3]
    value = _repeat_heads(inputs["value"], heads)
    out = cross_attention(**inputs, backend="reference")
    weights = attention_weights(**{name: x for name, x in inputs.items() if name != "value"}, backend="reference")
    squared_grad = cotangent(out).square()
    terms = squared_grad @ value.square().mT + (out.square() * squared_grad).sum(-1, keepdim=True)
    squares = {name: x.square().requires_grad_() for name, x in inputs.items() if name in ("query", "key", "bias")}
    scores = squares["query"] @ _repeat_heads(squares["key"], heads).mT / dim + squares.get("bias", 0.0)
    sizes = torch.autograd.grad(scores, list(squares.values()), weights.square() * terms)
    return {name: max(1.0, float(x.max().sqrt())) for name, x in zip(squares, sizes, strict=True)}


@interpreted
def test_weights_and_received_of_shared_grouped_keys() -> None:
    query, key = torch.randn(3, 4, 20, 8, device=DEVICE), torch.randn(1, 2, 50, 8, device=DEVICE)
    mask = SpanMask.key_padding([50, 7, 0]).to(DEVICE)
    with tiled(16, 16, 0):
        weights = attention_weights(query, key, mask, backend="triton")
        torch.testing.assert_close(weights, attention_weights(query, key, mask, backend="reference"))
        columns = attention_received(query, key, mask, backend="triton")
    torch.testing.assert_close(columns, weights.sum(2))


@interpreted
def test_a_gradient_of_the_log_sum_exp_alone() -> None:
    query, key = (torch.randn(1, 2, 9, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    both = []
    for backend in ("triton", "reference"):
        _, lse = cross_attention(query, key, key, return_lse=True, backend=backend)
        both.append(torch.autograd.grad(lse, (query, key), cotangent(lse)))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)
