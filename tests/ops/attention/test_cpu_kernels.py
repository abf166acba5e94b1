"""The CPU kernels of attention beyond the specs' cases: tiles and splits of each kind, threads, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, check, generator, name_of, peak_of, run
from ops.attention.tools import Hidden, check_hidden
from ops.cpu_tools import DTYPES, ISAS, each_dtype, each_isa, needs_kernels, python
from pairwise import parametrize, traits
from torch import Generator, Tensor

from mmkernels import SpanMask, attention_received, cross_attention
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.runtime import cpu
from mmkernels.spec import Case, Inputs, cast

pytestmark = needs_kernels


@pytest.fixture
def threads() -> None:
    """Two threads, whatever the machine has: enough to split work. (conftest.py puts the number back.)"""
    torch.set_num_threads(2)


def test_the_instruction_set_can_be_chosen_and_comes_back() -> None:
    offered = cpu.isas()

    def fail() -> None:
        with cpu.use_isa("plain"):
            assert cpu.isas()[0] == "plain"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert cpu.isas() == offered
    with pytest.raises(ValueError, match=r"name must be one of .*plain.*, got 'sse9'"), cpu.use_isa("sse9"):
        pass


def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from mmkernels.runtime import cpu; print(cpu.isas()[0])"
    assert python(code, MMKERNELS_CPU_ISA="plain").stdout.strip() == "plain"
    missing = python(code, MMKERNELS_CPU_EXTENSION="no/such/file.so")
    assert missing.returncode != 0 and "MMKERNELS_CPU_EXTENSION must name a file, got 'no/such" in missing.stderr
    wrong = python(code, MMKERNELS_CPU_ISA="mmx")
    assert wrong.returncode != 0 and "MMKERNELS_CPU_ISA must be one of" in wrong.stderr and "'mmx'" in wrong.stderr


# More than one tile, panel, chunk and split of everything.


def _inputs(batch: int, heads: int, q_len: int, k_len: int, dim: int, **more: Any) -> Callable[[Generator], Inputs]:
    """Masks and biases are made from (generator, inputs)."""

    def make(g: Generator) -> Inputs:
        sizes = {name: more[name] for name in ("key_heads", "key_batch", "value_dim") if name in more}
        inputs = attention_inputs(g, batch, heads, q_len, k_len, dim, **sizes) | {"return_lse": True}
        for name, x in more.items():
            if name not in sizes:
                inputs[name] = x(g) if callable(x) else x
        return inputs

    return make


def _bits(*shape: int, share: float = 0.5) -> Callable[[Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g) < share


def _bias(*shape: int, hide: float = 0.0) -> Callable[[Generator], Tensor]:
    return lambda g: normal(g, *shape).masked_fill(torch.rand(shape, generator=g) < hide, -math.inf)


def _strided(g: Generator) -> Inputs:
    shapes = ((2, 2, 70, 40), (2, 2, 130, 40), (2, 2, 130, 24))
    query, key, value = (normal(g, b, l, h, 2 * c + 1)[..., 1::2].transpose(1, 2) for b, h, l, c in shapes)
    return {"query": query, "key": key, "value": value, "mask": SpanMask.causal(70, 130)}


TILES = {
    "panels and tiles": _inputs(2, 4, 130, 300, 40, key_heads=2, mask=SpanMask.causal(130, 300)),
    "chunks of keys": _inputs(1, 2, 70, 2000, 64, mask=SpanMask.key_padding([1900])),
    "splits of the backward pass": _inputs(1, 1, 70, 900, 16, value_dim=24),
    "splits of decode": _inputs(1, 2, 3, 2100, 64, key_heads=1, mask=SpanMask.key_padding([2003])),
    "decode, shared keys, each sequence its own": _inputs(
        3, 4, 2, 200, 16, key_heads=2, key_batch=1, mask=lambda g: SpanMask.from_key_mask(_bits(3, 200)(g))
    ),
    "shared keys, each sequence its own": _inputs(
        3, 4, 20, 200, 16, key_heads=2, key_batch=1, mask=lambda g: SpanMask.from_key_mask(_bits(3, 200)(g))
    ),
    "valid keys and spans": _inputs(
        2, 2, 100, 150, 8, mask=lambda g: SpanMask.from_key_mask(_bits(2, 150)(g)) & SpanMask.window(40, 9, 100, 150)
    ),
    "media": _inputs(
        2, 2, 130, 400, 16, mask=SpanMask.media((torch.arange(130) // 30 - 1)[None].expand(2, -1), tokens_per_media=100)
    ),
    "dense": _inputs(2, 2, 100, 210, 16, mask=_bits(2, 1, 100, 210)),
    "sparse dense": _inputs(1, 2, 100, 210, 16, mask=_bits(1, 2, 100, 210, share=0.02)),
    "dense of queries": _inputs(2, 2, 100, 100, 16, mask=_bits(2, 1, 100, 1)),
    "dense key mask of each head": _inputs(2, 2, 100, 210, 16, mask=_bits(2, 2, 1, 210)),
    "dense, keys first": _inputs(1, 2, 70, 210, 16, mask=lambda g: _bits(1, 1, 210, 70)(g).mT),
    "bias": _inputs(2, 4, 100, 300, 16, key_heads=2, bias=_bias(2, 4, 100, 300)),
    "bias of all": _inputs(2, 4, 70, 500, 16, bias=_bias(70, 500)),
    "bias of queries": _inputs(1, 2, 70, 500, 16, bias=_bias(2, 70, 1)),
    "bias of keys": _inputs(2, 2, 70, 300, 16, bias=_bias(300), mask=SpanMask.key_padding([300, 101])),
    "bias that hides, with valid keys": _inputs(
        2, 2, 70, 210, 16, bias=_bias(1, 2, 70, 210, hide=0.3), mask=lambda g: SpanMask.from_key_mask(_bits(2, 210)(g))
    ),
    "dropout, gate": _inputs(2, 4, 70, 210, 16, key_heads=2, dropout_p=0.3, gate=_bias(4)),
    "negative scale": _inputs(1, 2, 70, 210, 16, scale=-0.3, mask=SpanMask.causal(70, 210)),
    "odd head dims": _inputs(2, 2, 70, 210, 31, value_dim=5, mask=SpanMask.causal(70, 210)),
    "splits of queries, shared keys": _inputs(3, 4, 70, 100, 16, key_heads=1, key_batch=1, gate=_bias(4)),
    "decode in blocks of rows": _inputs(20, 8, 2, 70, 16, key_heads=1, key_batch=1),
    "splits of valid keys": _inputs(
        1, 1, 70, 900, 16, mask=lambda g: SpanMask.from_key_mask(_bits(1, 900)(g)) & SpanMask.causal(70, 900)
    ),
    "dropout of valid and shared keys": _inputs(
        3, 2, 20, 150, 16, key_batch=1, dropout_p=0.4, mask=lambda g: SpanMask.from_key_mask(_bits(3, 150)(g))
    ),
    "dropout of panels of several sizes": _inputs(
        1, 2, 130, 60, 16, dropout_p=0.3, mask=SpanMask.media((torch.arange(130) // 30)[None], tokens_per_media=12)
    ),
    "wide heads": _inputs(1, 1, 70, 210, 200, value_dim=136),
    "strided": _strided,
}


_SCORES = ("query", "key", "mask", "bias", "scale")


def _cases(id: str) -> list[tuple[str, Case]]:
    """An op and a case: cross-attention, and the ops that compute its scores alone."""
    drawn = TILES[id](generator())
    grads = tuple(name for name in ("query", "key", "value", "bias", "gate") if name in drawn)
    scores = Case(id, lambda g: {name: x for name, x in TILES[id](g).items() if name in _SCORES})
    of_cross = Case(id, TILES[id], grads, seeded="dropout_p" in drawn)
    return [("cross_attention", of_cross), ("attention_received", scores), ("attention_weights", scores)]


CASES = {id: _cases(id) for id in TILES}
_TRAITS = {id: traits(make(generator())) for id, make in TILES.items()}


@parametrize(
    "id, dtype, isa, threads",
    list(itertools.product(TILES, DTYPES, ISAS, (2, 7))),
    lambda row: _TRAITS[row[0]] | {"id": row[0], "dtype": row[1], "isa": row[2], "threads": row[3]},
    ids=lambda row: f"{row[0]}-{name_of(row[1])}-{row[2]}-{row[3]}",
    once="id",
)
def test_tiles(id: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    """Tasks of other sizes for each number of threads, and the same budget."""
    with cpu.use_isa(isa):
        for op, case in CASES[id]:
            check(SPECS[op], case, dtype, "cpu", threads=threads)


def test_second_derivatives() -> None:
    """Of a first derivative by the kernels: the reference formula's, to float32's accuracy."""

    def second(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        g = generator(3)
        leaves = [normal(g, 1, 2, n, 8).to(dtype).requires_grad_() for n in (20, 30, 30)]
        out, lse = cross_attention(*leaves, SpanMask.key_padding([23]), return_lse=True, backend=backend)
        first = torch.autograd.grad(out.pow(2).sum() + lse.sin().sum(), leaves, create_graph=True)
        return (*(x.detach() for x in first), *torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves))

    for mine, true in zip(second(torch.float32, "cpu"), second(torch.float64, "reference"), strict=True):
        assert bool(true.any())
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4 * float(true.abs().max()))


def test_again_the_same_bits(threads: None) -> None:
    inputs = cast(TILES["bias of all"](generator()), torch.float32)
    case = Case("bias of all", lambda g: inputs, ("query", "key", "value", "bias"))
    first, *others = (run(SPECS["cross_attention"], case, inputs, "cpu") for _ in range(3))
    assert all(torch.equal(a, b) for again in others for a, b in zip(again.tensors, first.tensors, strict=True))


_NON_FINITE = itertools.product(
    ISAS,
    DTYPES,
    (50, 51),
    ("spans", "dense", "key_valid", "bias"),
    ("key", "value", "query", "grad"),
    (math.nan, math.inf, -math.inf),
)


@pytest.mark.parametrize("lengths", [None, [200, 200], [200, 130]], ids=["all", "even", "uneven"])
@each_dtype
def test_panels_that_share_tiles_are_as_each_alone(
    dtype: torch.dtype, lengths: list[int] | None, threads: None
) -> None:
    """330 queries are 6 panels, cut for two threads; those of a call of 64 queries share nothing."""
    gen = generator(0)
    query, key, value = (normal(gen, 2, 1, n, 160).to(dtype) for n in (330, 200, 200))
    mask = None if lengths is None else SpanMask.key_padding(lengths)
    whole = cross_attention(query, key, value, mask=mask, backend="cpu")
    parts = [cross_attention(x, key, value, mask=mask, backend="cpu") for x in query.split(64, dim=2)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=2), rtol=0, atol=0)


@parametrize(
    "isa, dtype, edge, kind, where, bad",
    list(_NON_FINITE),
    strength=3,
    ids=lambda row: "-".join(name_of(x) if isinstance(x, torch.dtype) else str(x) for x in row),
)
def test_non_finite_stays_hidden_in_shared_tiles(
    isa: str, dtype: torch.dtype, edge: int, kind: str, where: str, bad: float
) -> None:
    """Queries 0 to 29 see keys below `edge`, the others almost all of them; they share tiles."""
    with cpu.use_isa(isa):
        hidden = Hidden(70, 110, blind=30, edge=edge, key=100, row=60)
        _, of_key, _ = check_hidden("cpu", dtype, hidden, kind, where, bad, dim=20)
    if where in ("query", "grad"):  # the keys that they see
        assert not bool(of_key[:, :, 50:109].isfinite().all())


@each_dtype
@each_isa
def test_what_is_padded_stays_hidden_whatever_its_length(isa: str, dtype: torch.dtype) -> None:
    """One panel, or several that share a tile of keys and end within it at odd and even places."""
    with cpu.use_isa(isa):
        for q_len, ends in ((20, [51]), (20, [50]), (256, [51, 96, 95, 33])):
            end = torch.tensor(ends, dtype=torch.int32).repeat_interleave(q_len // len(ends))[None]
            mask = SpanMask(torch.zeros_like(end), end)
            q, k, v = (torch.randn(1, 4, n, 16).to(dtype) for n in (q_len, 96, 96))
            k[:, :, max(ends) :] = v[:, :, max(ends) :] = math.nan
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = cross_attention(*leaves, mask, backend="cpu")
            grads = torch.autograd.grad(out.float().sum(), leaves)
            assert bool(out.isfinite().all()) and all(bool(grad.isfinite().all()) for grad in grads)
        v = torch.randn(4, 16, 96, 16).to(dtype)
        v[:, :, 51:] = math.nan
        end = torch.where(torch.arange(256) < 64, 51, 96).int()[None]
        q, k = torch.randn(4, 16, 256, 16).to(dtype), torch.randn(4, 16, 96, 16).to(dtype)
        out = cross_attention(q, k, v, SpanMask(torch.zeros_like(end), end), backend="cpu")
        assert bool(out[:, :, :64].isfinite().all()) and bool(out[:, :, 64:].isnan().all())


@each_dtype
@each_isa
def test_scores_of_minus_infinity_meet_no_padding(isa: str, dtype: torch.dtype) -> None:
    q, k = torch.rand(1, 2, 9, 8).to(dtype), torch.rand(1, 2, 7, 8).to(dtype)
    k[0, 0, 3, 2] = -math.inf
    with cpu.use_isa(isa):
        received = attention_received(q, k, backend="cpu")
        assert received[0, 0, 3] == 0 and bool(received.isfinite().all())
        leaf = torch.rand(1, 2, 7, 8).to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(cross_attention(q, k, leaf, backend="cpu").float().sum(), leaf)
        assert bool(grad.isfinite().all()) and not bool(grad[0, 0, 3].any())


@pytest.mark.parametrize("q_len", [3, 20])
def test_any_byte_but_zero_is_true(q_len: int) -> None:
    bits = torch.rand(1, 1, q_len, 50) < 0.5
    odd = (bits.to(torch.uint8) * 2).view(torch.bool)
    q, k = torch.randn(1, 2, q_len, 8), torch.randn(1, 2, 50, 8)
    for a, b in ((bits, odd), (bits[:, :, :1], odd[:, :, :1])):
        assert torch.equal(cross_attention(q, k, k, a, backend="cpu"), cross_attention(q, k, k, b, backend="cpu"))


# Threads and processes.


# Memory, and what the kernels refuse.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_memory_at_8192(dtype: torch.dtype, threads: None) -> None:
    """Output and scratch together stay below 2 % of the scores' matrix, as float32 4 GiB."""
    q, k, v = (torch.randn(1, 16, 8192, 64).to(dtype) for _ in range(3))
    call = lambda n: cross_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], backend="cpu")
    assert peak_of(lambda: call(8192), lambda: call(512)) < 0.02 * 16 * 8192 * 8192 * q.element_size()


def test_backward_memory_is_linear(threads: None) -> None:
    leaves = [torch.randn(1, 4, n, 64, requires_grad=True) for n in (2048, 4096, 4096)]
    out = cross_attention(*leaves, backend="cpu")
    grad = torch.randn_like(out)
    peak = peak_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert peak < 2 * sum(x.numel() * 4 for x in leaves)


def test_decode_memory_is_bounded(threads: None) -> None:
    """Many queries of one shared key head: 4 MiB of output, and no more scratch than a task's."""
    q, k = torch.randn(256, 8, 8, 64), torch.randn(1, 1, 64, 64)
    assert peak_of(lambda: cross_attention(q, k, k, backend="cpu")) < 1.5 * q.numel() * 4


def test_received_of_nothing() -> None:
    assert attention_received(torch.randn(1, 2, 0, 4), torch.randn(1, 2, 5, 4), backend="cpu").eq(0).all()
    assert attention_received(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4), backend="cpu").shape == (1, 2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 2, 7, 9)}, "key must be on the CPU and of shape"),
        ({"key": torch.zeros(1, 3, 7, 8)}, "key must fit query"),
        ({"value": torch.zeros(1, 2, 6, 8)}, "value must be on the CPU and of shape"),
        ({"start": torch.zeros(1, 4).int(), "end": torch.zeros(1, 5).int()}, "start must be on the CPU and of shape"),
        ({"key_valid": torch.ones(1, 6).bool()}, "key_valid must be on the CPU and of shape"),
        ({"dense": torch.ones(1, 1, 5, 6).bool()}, "dense must be on the CPU and of shape"),
        ({"bias": torch.ones(1, 1, 4, 7)}, "bias must be on the CPU and of shape"),
        ({"gate": torch.ones(3)}, "gate must have 1 or 2 elements"),
        ({"seed": torch.ones(2).long()}, "seed must be on the CPU and of shape"),
        (
            {name: torch.zeros(1, 2, 7, 8).double() for name in ("query", "key", "value")},
            "the cpu backend takes float32, bfloat16 and float16, got Double",
        ),
    ],
)
def test_the_operator_itself_reads_past_no_end(change: dict[str, Tensor], message: str) -> None:
    names = ("query", "key", "value", "start", "end", "key_valid", "dense", "bias", "gate", "seed")
    inputs: dict[str, Any] = dict.fromkeys(names)
    inputs |= {"query": torch.zeros(1, 2, 5, 8), "key": torch.zeros(1, 2, 7, 8), "value": torch.zeros(1, 2, 7, 8)}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.mmkernels.cross_attention_cpu(*(inputs | change).values(), 1.0, 0.0)


@each_isa
@pytest.mark.parametrize("dim", [8, 24, 40])
def test_transposed_rows_are_padded_with_zeros(isa: str, dim: int) -> None:
    """Rows of bfloat16 that are copied from columns: their last vector may be half padding."""
    query, key = (torch.randn(1, 2, dim, n, generator=generator(dim)).bfloat16().mT for n in (5, 40))
    with cpu.use_isa(isa):
        expected = attention_received(query.contiguous(), key.contiguous(), backend="cpu")
        lost = torch.full((1, 2, 64, 40), math.nan).bfloat16().mT
        attention_received(lost[:, :, :5], lost, backend="cpu")  # leaves NaN in the memory that rows are copied to
        assert torch.equal(attention_received(query, key, backend="cpu"), expected)
