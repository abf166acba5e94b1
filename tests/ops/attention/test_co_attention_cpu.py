"""The CPU kernels of co-attention beyond the spec's cases: tiles, slabs and sides of each kind, threads, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, check, generator, name_of, peak_of, run
from ops.cpu_tools import DTYPES, ISAS, each_dtype, each_isa, needs_kernels
from pairwise import parametrize
from torch import Generator, Tensor

from mmkernels import SpanMask, co_attention
from mmkernels.ops.attention.co_attention.cases import co_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.runtime import cpu
from mmkernels.spec import Case, Inputs, cast

pytestmark = needs_kernels

SPEC = SPECS["co_attention"]

_NAMES = ("a", "b", "value_a", "value_b", "grad_a", "grad_b")


def _inputs(
    batch: int, heads: int, a_len: int, b_len: int, dim: int, *, dims: tuple[int, int] | None = None, **more: Any
) -> Callable[[Generator], Inputs]:
    """What is callable in `more` is made from the generator; `dims` are those of the values."""

    def make(g: Generator) -> Inputs:
        of_a, of_b = dims or (dim, dim)
        inputs = co_inputs(g, batch, heads, a_len, b_len, dim, value_a_dim=of_a, value_b_dim=of_b)
        return inputs | {name: x(g) if callable(x) else x for name, x in more.items()}

    return make


def _bits(*shape: int, share: float = 0.5) -> Callable[[Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g) < share


def _bias(*shape: int, hide: float = 0.0) -> Callable[[Generator], Tensor]:
    return lambda g: normal(g, *shape).masked_fill(torch.rand(shape, generator=g) < hide, -math.inf)


def _strided(g: Generator) -> Inputs:
    shapes = {"a": (130, 40), "b": (70, 40), "value_a": (130, 24), "value_b": (70, 24)}
    return {n: normal(g, 2, l, 2, 2 * c + 1)[..., 1::2].transpose(1, 2) for n, (l, c) in shapes.items()}


def _columns_first(g: Generator) -> Inputs:
    shapes = {"a": (70, 40), "b": (130, 40), "value_a": (70, 24), "value_b": (130, 24)}
    return {name: normal(g, 1, 2, c, l).mT for name, (l, c) in shapes.items()}


def _tokens(g: Generator, a_len: int, b_len: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, value_a, value_b = (torch.randn(1, 2, n, dim, generator=g) for n in (a_len, b_len, a_len, b_len))
    return a, b, value_a, value_b


# Names say which side is longer: its tokens are the lanes of a tile.
TILES = {
    "a: panels and tiles": _inputs(2, 2, 330, 130, 40),
    "b: panels and tiles": _inputs(2, 2, 130, 330, 40),
    "a: slabs": _inputs(1, 1, 900, 100, 16, dims=(24, 8)),
    "b: slabs": _inputs(1, 1, 100, 900, 16, dims=(24, 8)),
    "a: few rows": _inputs(1, 2, 300, 3, 16),
    "both: odd dims": _inputs(2, 2, 97, 97, 31, dims=(5, 19)),
    "a: wide heads": _inputs(1, 1, 140, 70, 200, dims=(136, 256)),
    "a: causal": _inputs(2, 2, 200, 130, 16, mask=SpanMask.causal(200, 130)),
    "b: causal": _inputs(2, 2, 130, 200, 16, mask=SpanMask.causal(130, 200)),
    "a: valid and spans": _inputs(
        2, 2, 150, 100, 8, mask=lambda g: SpanMask.from_key_mask(_bits(2, 100)(g)) & SpanMask.window(40, 9, 150, 100)
    ),
    "b: valid and spans": _inputs(
        2, 2, 100, 150, 8, mask=lambda g: SpanMask.from_key_mask(_bits(2, 150)(g)) & SpanMask.window(40, 9, 100, 150)
    ),
    "a: packed": _inputs(1, 2, 200, 110, 16, mask=SpanMask.packed([70, 0, 130], [10, 60, 40])),
    "a: dense": _inputs(2, 2, 210, 100, 16, mask=_bits(2, 1, 210, 100)),
    "b: dense": _inputs(2, 2, 100, 210, 16, mask=_bits(1, 2, 100, 210)),
    "b: sparse dense": _inputs(1, 2, 100, 210, 16, mask=_bits(1, 2, 100, 210, share=0.01)),
    "a: dense of tokens of b": _inputs(2, 2, 210, 100, 16, mask=_bits(2, 1, 1, 100)),
    "b: dense of tokens of b": _inputs(2, 2, 100, 210, 16, mask=_bits(2, 2, 1, 210)),
    "a: validity": _inputs(2, 2, 210, 130, 16, valid_a=_bits(2, 210), valid_b=_bits(2, 130)),
    "b: validity": _inputs(2, 2, 130, 210, 16, valid_a=_bits(1, 130), valid_b=_bits(2, 210)),
    "a: validity, dense": _inputs(1, 2, 210, 130, 16, valid_a=_bits(1, 210), mask=_bits(1, 1, 210, 130)),
    "a: bias": _inputs(2, 2, 210, 100, 16, bias=_bias(2, 2, 210, 100)),
    "b: bias": _inputs(2, 2, 100, 210, 16, bias=_bias(2, 2, 100, 210)),
    "a: bias of all": _inputs(2, 2, 300, 70, 16, bias=_bias(300, 70)),
    "b: bias of all": _inputs(2, 2, 70, 300, 16, bias=_bias(70, 300)),
    "a: bias of a": _inputs(1, 2, 300, 70, 16, bias=_bias(2, 300, 1)),
    "b: bias of a": _inputs(1, 2, 70, 300, 16, bias=_bias(2, 70, 1)),
    "a: bias of b": _inputs(2, 2, 300, 70, 16, bias=_bias(70)),
    "b: bias of b": _inputs(2, 2, 70, 300, 16, bias=_bias(300)),
    "a: bias that hides": _inputs(1, 2, 210, 70, 16, bias=_bias(1, 2, 210, 70, hide=0.3), valid_b=_bits(1, 70)),
    "b: bias that hides": _inputs(1, 2, 70, 210, 16, bias=_bias(1, 2, 70, 210, hide=0.3), valid_b=_bits(1, 210)),
    "a: dropout": _inputs(2, 2, 210, 70, 16, dropout_p=0.3),
    "b: dropout": _inputs(2, 2, 70, 210, 16, dropout_p=0.3, mask=_bits(70, 210)),
    "a: clamp": _inputs(1, 2, 210, 70, 16, clamp=2.0),
    "b: clamp, bias": _inputs(1, 2, 70, 210, 16, clamp=2.0, bias=_bias(70, 210), mask=SpanMask.causal(70, 210)),
    "a: negative scale": _inputs(1, 2, 210, 70, 16, scale=-0.3, mask=SpanMask.causal(210, 70)),
    "a: strided": _strided,
    "b: columns first": _columns_first,
}


def _case(id: str) -> Case:
    drawn = TILES[id](generator())
    grads = tuple(name for name in ("a", "b", "value_a", "value_b", "bias") if name in drawn)
    return Case(id, TILES[id], grads, seeded="dropout_p" in drawn)


CASES = {id: _case(id) for id in TILES}
_INPUTS = {id: make(generator()) for id, make in TILES.items()}


def _axes(row: tuple[Any, ...]) -> dict[str, Any]:
    """Returns which side is longer, and the arguments beside the tokens: which there are, and the kind of mask."""
    id, dtype, isa, threads = row
    given = {name: type(x) for name, x in _INPUTS[id].items() if name not in _NAMES[:4]}
    return {"id": id, "side": id[0], "dtype": dtype, "isa": isa, "threads": threads} | given


@parametrize(
    "id, dtype, isa, threads",
    list(itertools.product(TILES, DTYPES, ISAS, (2, 7))),
    _axes,
    ids=lambda row: f"{row[0]}-{name_of(row[1])}-{row[2]}-{row[3]}",
    once="id",
)
def test_tiles(id: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    """Slabs of other sizes for each number of threads, and the same budget."""
    with cpu.use_isa(isa):
        check(SPEC, CASES[id], dtype, "cpu", threads=threads)


def test_again_the_same_bits() -> None:
    torch.set_num_threads(2)
    inputs = cast(TILES["a: bias of all"](generator()), torch.float32)
    case = Case("a: bias of all", lambda g: inputs, ("a", "b", "value_a", "value_b", "bias"))
    first, *others = (run(SPEC, case, inputs, "cpu") for _ in range(3))
    assert all(torch.equal(a, b) for again in others for a, b in zip(again.tensors, first.tensors, strict=True))


# What is hidden stays hidden.


def _arguments(kind: str, a_len: int, b_len: int, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Returns a call's arguments, and which pairs [La, Lb] are visible to a, and to b."""
    i, j = torch.arange(a_len)[:, None], torch.arange(b_len)
    shown = torch.ones(a_len, b_len, dtype=torch.bool)
    if kind == "valid":  # of pairs that stay visible in one direction
        valid_a, valid_b = i[:, 0] % 5 != 2, j % 7 != 3
        return {"valid_a": valid_a[None], "valid_b": valid_b[None]}, shown & valid_b, shown & valid_a[:, None]
    if kind == "spans":
        shown = (j >= i // 2 - 20) & (j < i // 2 + 20) & (j % 7 != 3)
        start, end = ((i[:, 0] // 2 + n)[None].int() for n in (-20, 20))
        return {"mask": SpanMask(start.clamp_min(0), end, (j % 7 != 3)[None])}, shown, shown
    shown = (i * 7 + j * 5) % 11 > 5
    bias = torch.zeros(a_len, b_len, dtype=dtype).masked_fill(~shown, -math.inf)
    return {"bias": bias} if kind == "bias" else {"mask": shown}, shown, shown


def _reached(where: str, bad: Tensor, to_a: Tensor, to_b: Tensor) -> dict[str, Tensor]:
    """Returns which tokens' outputs and gradients may hold what is in the tokens `bad` of `where`.

    Args:
        to_a, to_b: bool [La, Lb], the pairs that are visible to a, and to b.
    """
    none_a, none_b = (torch.zeros(n, dtype=torch.bool) for n in to_a.shape)
    in_a, value_a, grad_a = (bad if where == name else none_a for name in ("a", "value_a", "grad_a"))
    in_b, value_b, grad_b = (bad if where == name else none_b for name in ("b", "value_b", "grad_b"))
    scores = in_a[:, None] | in_b
    lse_a, lse_b = (to_a & scores).any(1), (to_b & scores).any(0)
    out_a, out_b = lse_a | (to_a & value_b).any(1), lse_b | (to_b & value_a[:, None]).any(0)
    state_a, state_b = out_a | grad_a, out_b | grad_b  # of delta
    grad = (to_a & (state_a[:, None] | scores | value_b)) | (to_b & (state_b | scores | value_a[:, None]))
    return {
        "out_a": out_a,
        "out_b": out_b,
        "a": grad.any(1),
        "b": grad.any(0),
        "value_a": (to_b & (lse_b | grad_b)).any(1),
        "value_b": (to_a & (lse_a | grad_a)[:, None]).any(0),
    }


_NON_FINITE = itertools.product(
    ISAS, DTYPES, ("valid", "spans", "dense", "bias"), _NAMES, (math.nan, math.inf, -math.inf), ((150, 70), (70, 150))
)


@parametrize(
    "isa, dtype, kind, where, bad, sizes",
    list(_NON_FINITE),
    ids=lambda row: "-".join(name_of(x) if isinstance(x, torch.dtype) else str(x) for x in row),
)
def test_non_finite_stays_hidden(
    isa: str, dtype: torch.dtype, kind: str, where: str, bad: float, sizes: tuple[int, int]
) -> None:
    """In a few tokens: what none of them reaches keeps its bits, and what sees NaN reports it."""
    g = generator(7)
    lengths = dict(zip(_NAMES, (*sizes, *sizes, *sizes), strict=True))
    clean = {name: torch.randn(1, 2, n, 20, generator=g).to(dtype) for name, n in lengths.items()}
    dirty = {name: x.clone() for name, x in clean.items()}
    tokens = torch.zeros(lengths[where], dtype=torch.bool)
    tokens[[3, 52]] = True
    dirty[where][:, :, tokens, 5] = bad
    arguments, to_a, to_b = _arguments(kind, *sizes, dtype)

    def results(x: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves: dict[str, Any] = {name: x[name].detach().requires_grad_() for name in _NAMES[:4]}
        with cpu.use_isa(isa):
            outs = co_attention(**leaves, **arguments, backend="cpu")
            grads = torch.autograd.grad(outs, list(leaves.values()), (x["grad_a"], x["grad_b"]))
        return dict(zip(("out_a", "out_b", *leaves), (*outs, *grads), strict=True))

    want, got, reached = results(clean), results(dirty), _reached(where, tokens, to_a, to_b)
    for name, hit in reached.items():
        assert torch.equal(got[name][:, :, ~hit], want[name][:, :, ~hit]), name
        assert bool(want[name].isfinite().all())
        if math.isnan(bad):
            assert bool(got[name][:, :, hit].isnan().any(-1).all()), name
    if where in ("value_a", "value_b"):
        out = "out_b" if where == "value_a" else "out_a"
        assert not bool(got[out][:, :, reached[out], 5].isfinite().any())


@each_dtype
@each_isa
def test_padding_of_any_length(isa: str, dtype: torch.dtype) -> None:
    """Tiles and panels that end at odd and even places, with NaN past them."""
    for length in (1, 51, 97):
        a, b, value_a, value_b = (x.to(dtype) for x in _tokens(generator(length), 130, 130))
        for x in (a, b, value_a, value_b):
            x[:, :, length:] = math.nan
        mask = torch.zeros(130, 130, dtype=torch.bool)
        mask[:length, :length] = True
        with cpu.use_isa(isa):
            got = co_attention(a, b, value_a, value_b, mask, backend="cpu")
        want = co_attention(*(x[:, :, :length] for x in (a, b, value_a, value_b)), backend="reference")
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x[:, :, :length], y, rtol=2e-2, atol=2e-2)
            assert not bool(x[:, :, length:].any())


def test_any_byte_but_zero_is_true() -> None:
    g = generator()
    tokens = _tokens(g, 70, 50)
    masks: dict[str, Any] = {"mask": _bits(70, 50)(g), "valid_a": _bits(1, 70)(g), "valid_b": _bits(1, 50)(g)}
    odd: dict[str, Any] = {name: (x.to(torch.uint8) * 2).view(torch.bool) for name, x in masks.items()}
    pairs = zip(co_attention(*tokens, **masks, backend="cpu"), co_attention(*tokens, **odd, backend="cpu"), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("lengths", [(70, 0), (0, 70), (0, 0)])
def test_a_side_of_length_0(lengths: tuple[int, int]) -> None:
    leaves = [torch.randn(2, 2, n, 8, requires_grad=True) for n in (*lengths, *lengths)]
    outs = co_attention(*leaves, backend="cpu")
    assert [x.shape[2] for x in outs] == list(lengths) and not any(bool(x.any()) for x in outs)
    assert not any(bool(x.any()) for x in torch.autograd.grad([x.sum() for x in outs], leaves))


# The floor of scores.


@pytest.mark.parametrize("hide", [False, True])
def test_the_floor_counts_hidden_pairs(hide: bool) -> None:
    """A hidden pair has the largest score: all others lie below the floor, so that each weight is the same."""
    a, b, value_a, value_b = _tokens(generator(), 150, 70)
    a[:, :, 77] = b[:, :, 33] = 100.0
    mask = torch.ones(150, 70, dtype=torch.bool)
    mask[77], mask[:, 33] = not hide, not hide
    out_a, out_b = co_attention(a, b, value_a, value_b, mask, clamp=1_000.0, backend="cpu")
    want = co_attention(a, b, value_a, value_b, mask, clamp=1_000.0, backend="reference")
    torch.testing.assert_close((out_a, out_b), want, rtol=1e-4, atol=1e-4)
    if hide:
        torch.testing.assert_close(out_a[0, 0, 0], value_b[0, 0, mask[0]].mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_floor_ignores_scores_that_are_not_finite(bad: float) -> None:
    """Of a hidden token, for which the bound by norms says nothing."""
    a, b, value_a, value_b = _tokens(generator(), 150, 70)
    mask = torch.ones(150, 70, dtype=torch.bool)
    mask[77] = False
    want = co_attention(a, b, value_a, value_b, mask, backend="cpu")
    a[:, :, 77, 3] = bad
    got = co_attention(a, b, value_a, value_b, mask, clamp=50_000.0, backend="cpu")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "columns first": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.full((*x.shape[:3], 2 * x.shape[3]), 99.0, dtype=x.dtype)[..., ::2].copy_(x),
    "of a": lambda x: x[:, :, :, -1:].clone().expand(x.shape),
    "of b": lambda x: x[:, :1, -1:].clone().expand(x.shape),
}


@each_isa
@pytest.mark.parametrize(("sizes", "last"), [((37, 75), 10.0), ((75, 37), -10.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_alone_can_reach_the_floor(layout: str, sizes: tuple[int, int], last: float, isa: str) -> None:
    """All scores are 0 but those of one pair or line, and of a pair that is hidden."""
    dtype = DTYPES[list(LAYOUTS).index(layout) % 3]
    bias = torch.zeros(2, 3, *sizes, dtype=dtype)
    bias[0, 0, 0, 0], bias[-1, -1, -1, -1] = -math.inf, last
    bias = LAYOUTS[layout](bias)
    a, b = (torch.zeros(2, 3, n, 8, dtype=dtype) for n in sizes)
    value_a, value_b = (torch.randn(2, 3, n, 8, generator=generator(n)).to(dtype) for n in sizes)
    with cpu.use_isa(isa):
        got = co_attention(a, b, value_a, value_b, bias=bias, clamp=5.0, backend="cpu")
    wide = bias.double()
    scores = wide.clamp(min=max(last, 0.0) - 5).masked_fill(wide == -math.inf, -math.inf)
    want = scores.softmax(-1) @ value_b.double(), scores.mT.softmax(-1) @ value_a.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


# Memory, and what the kernels refuse.


@pytest.mark.alone
def test_memory_is_linear() -> None:
    torch.set_num_threads(2)
    leaves = [torch.randn(1, 4, n, 64, requires_grad=True) for n in (4096, 2048, 4096, 2048)]
    size = sum(x.numel() * 4 for x in leaves)
    call = lambda: co_attention(*leaves, backend="cpu")
    assert peak_of(call) < 1.5 * size
    bias = torch.zeros(1, 4, 4096, 1).expand(-1, -1, -1, 2048)
    assert peak_of(lambda: co_attention(*leaves, bias=bias, clamp=5e4, backend="cpu")) < 1.5 * size
    outs = call()
    grads = [torch.randn_like(x) for x in outs]
    assert peak_of(lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)) < 2 * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(1, 2, 7, 9)}, "b must be on the CPU and of shape"),
        ({"b": torch.zeros(1, 3, 7, 8)}, "b must be on the CPU and of shape"),
        ({"value_a": torch.zeros(1, 2, 6, 8)}, "value_a must be on the CPU and of shape"),
        ({"value_b": torch.zeros(1, 2, 6, 8)}, "value_b must be on the CPU and of shape"),
        ({"value_b": torch.zeros(1, 2, 7, 8).half()}, "value_b must have a's dtype"),
        ({"start": torch.zeros(1, 4).int(), "end": torch.zeros(1, 5).int()}, "start must be on the CPU and of shape"),
        ({"key_valid": torch.ones(1, 6).bool()}, "key_valid must be on the CPU and of shape"),
        ({"valid_a": torch.ones(1, 7).bool()}, "valid_a must be on the CPU and of shape"),
        ({"valid_b": torch.ones(1, 5).bool()}, "valid_b must be on the CPU and of shape"),
        ({"dense": torch.ones(1, 1, 5, 6).bool()}, "dense must be on the CPU and of shape"),
        ({"bias": torch.ones(1, 1, 4, 7)}, "bias must be on the CPU and of shape"),
        ({"seed": torch.ones(1).long()}, "seed must be on the CPU and of shape"),
        (
            {name: torch.zeros(1, 2, n, 8).double() for name, n in zip(_NAMES[:4], (5, 7, 5, 7), strict=True)},
            "the cpu backend takes float32, bfloat16 and float16, got Double",
        ),
    ],
)
def test_the_operator_itself_reads_past_no_end(change: dict[str, Tensor], message: str) -> None:
    optional = ("start", "end", "key_valid", "dense", "valid_a", "valid_b", "bias", "seed")
    inputs: dict[str, Any] = dict(zip(_NAMES[:4], (torch.zeros(1, 2, n, 8) for n in (5, 7, 5, 7)), strict=True))
    inputs |= dict.fromkeys(optional)
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.mmkernels.co_attention_cpu(*(inputs | change).values(), 1.0, 0.0, 0.0)
