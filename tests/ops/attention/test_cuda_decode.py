"""The CUDA decode kernels without a GPU: the same source on the host, instruction by instruction as PTX defines them.

What this can't tell: speed, and whether the compiler and the GPU do what the PTX ISA says.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import cuda_emulation as emulation
import pytest
import torch
from harness import name_of
from layouts import far_apart
from pairwise import parametrize
from torch import Tensor

from mmkernels.ops.attention.cross_attention import cuda
from mmkernels.ops.attention.cross_attention.spec import SPEC, Arguments, reference

pytestmark = pytest.mark.skipif(emulation.why_not() is not None, reason=str(emulation.why_not()))

DTYPES = (torch.bfloat16, torch.float16)
DIMS = (64, 80, 96, 128)
NAMES = ("query", "key", "value", "start", "end", "key_valid", "dense", "bias", "gate", "seed")

Inputs = dict[str, Any]


def draw(
    batch: int = 2,
    heads: int = 2,
    key_heads: int = 1,
    q_len: int = 1,
    k_len: int = 150,
    dim: int = 64,
    *,
    key_batch: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    key_shape = (batch if key_batch is None else key_batch, key_heads, k_len, dim)
    query, key, value = (torch.randn(shape).to(dtype) for shape in ((batch, heads, q_len, dim), key_shape, key_shape))
    return {"query": query, "key": key, "value": value}


def spans(*pairs: tuple[int, int]) -> Inputs:
    """One batch entry's spans, [1, Lq]."""
    start, end = (torch.tensor([x], dtype=torch.int32) for x in zip(*pairs, strict=True))
    return {"start": start, "end": end}


def check(inputs: Inputs, splits: int = 1, schedule: int = 0) -> tuple[Tensor, Tensor]:
    """Assert the op's error budget; returns the kernels' results."""
    ours = emulation.decode(**inputs, splits=splits, schedule=schedule)
    compare(inputs, ours)
    return ours


def compare(inputs: Inputs, ours: tuple[Tensor, Tensor]) -> None:
    scale = inputs.get("scale", inputs["query"].shape[3] ** -0.5)
    given = [inputs.get(name) for name in NAMES]
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    naive, true = (reference(Arguments(*tensors, scale=scale, dropout_p=0.0)) for tensors in (given, wide))
    for name, mine, same, exact in zip(("out", "lse"), ours, naive, true, strict=True):
        problem = SPEC.over_budget(mine, same, exact)
        assert problem is None, f"{name}: {problem}"


_ROWS = {"1": (2, 2, 1), "4": (4, 1, 1), "20": (4, 1, 5), "64": (8, 1, 8)}


@parametrize(
    "dtype, dim, splits, rows",
    list(itertools.product(DTYPES, DIMS, (1, 3), _ROWS)),
    ids=lambda row: f"{name_of(row[0])}-{row[1]}-{row[2]}-{row[3]}",
    strength=3,
)
def test_dims_and_rows(dtype: torch.dtype, dim: int, splits: int, rows: str) -> None:
    heads, key_heads, q_len = _ROWS[rows]
    check(draw(1, heads, key_heads, q_len, 200, dim, dtype=dtype), splits)


@pytest.mark.parametrize("q_len", range(1, 9))
@pytest.mark.parametrize("group", [1, 4, 8])
def test_queries_and_groups(q_len: int, group: int) -> None:
    check(draw(2, 2 * group, 2, q_len, 70) | spans(*((3 * i, 40 + 4 * i) for i in range(q_len))), 1 + q_len % 2)


@pytest.mark.parametrize("k_len", [1, 15, 16, 17, 63, 64, 65, 128, 191, 193, 257, 400])
@pytest.mark.parametrize("splits", [1, 2, 7, 128])
def test_key_lengths_and_splits(k_len: int, splits: int) -> None:
    """More splits than tiles too: some blocks have no key."""
    check(draw(1, 2, 1, 1, k_len), splits)


@parametrize(
    "schedule, heads, valid",
    list(itertools.product(emulation.SCHEDULES[1:], (2, 12, 30), (False, True))),
    ids=lambda row: f"schedule {row[0]}-{row[1]} heads-{'valid' if row[2] else 'all'}",
)
def test_any_order_of_threads_and_copies(schedule: int, heads: int, valid: bool) -> None:
    """Bit for bit the same: a race would show."""
    inputs = draw(1, heads, 1, 2, 500) | spans((7, 450), (100, 493))
    if valid:
        inputs["key_valid"] = torch.rand(1, 500) < 0.7
    first, again = (check(inputs, 2, schedule=s) for s in (0, schedule))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 300), (0, 300)],
        [(5, 200), (90, 170)],
        [(0, 10), (290, 300)],
        [(299, 300), (17, 18)],
        [(0, 0), (30, 210)],
        [(200, 100), (0, 300)],
        [(0, 0), (300, 300)],
        [(-(2**31), 2**31 - 1), (-5, 1000)],
        [(2**31 - 1, -(2**31)), (250, 2**31 - 1)],
        [(300, 400), (-100, 0)],
    ],
    ids=str,
)
def test_spans(pairs: list[tuple[int, int]], splits: int) -> None:
    out, lse = check(draw(2, 4, 2, 2, 300) | spans(*pairs), splits)
    for i, (start, end) in enumerate(pairs):
        if max(start, 0) >= min(end, 300):
            assert not out[:, :, i].any() and (lse[:, :, i] == -math.inf).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (3, 3)], ids=str)
def test_shapes_of_spans(shape: tuple[int, int]) -> None:
    start, end = torch.randint(0, 60, shape).int(), torch.randint(40, 130, shape).int()
    check(draw(3, 4, 2, 3, 120) | {"start": start, "end": end.T.contiguous().T}, 2)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("key_batch", [1, 3])
def test_valid_keys(batch: int, key_batch: int, splits: int) -> None:
    valid = torch.rand(batch, 190) < 0.5
    valid[-1, 20:150] = False
    check(draw(3, 4, 2, 2, 190, key_batch=key_batch) | {"key_valid": valid}, splits)
    check(draw(3, 4, 2, 2, 190, key_batch=key_batch) | spans((3, 90), (60, 185)) | {"key_valid": valid}, splits)


def test_valid_keys_in_steps_and_none() -> None:
    every_other = (torch.rand(2, 380) < 0.5)[:, ::2]
    check(draw(2, 2, 1, 1, 190) | {"key_valid": every_other})
    out, lse = check(draw(2, 2, 1, 1, 190) | {"key_valid": torch.zeros(1, 190, dtype=torch.bool)}, 2)
    assert not out.any() and (lse == -math.inf).all()
    odd = torch.full((1, 190), 2, dtype=torch.uint8).view(torch.bool)  # any byte but zero is true
    inputs = draw(1, 2, 1, 1, 190)
    assert torch.equal(emulation.decode(**inputs, key_valid=odd)[0], emulation.decode(**inputs)[0])


@pytest.mark.parametrize("key_batch", [1, 3])
def test_shared_keys(key_batch: int) -> None:
    check(draw(3, 6, 2, 2, 130, key_batch=key_batch), 2)


@pytest.mark.parametrize("dim", DIMS)
def test_strided_views(dim: int) -> None:
    """One buffer of a fused projection, [B, L, 3 heads, D + 8] in memory; what lies between rows is NaN."""
    buffer = torch.full((2, 150, 6, dim + 8), math.nan, dtype=torch.bfloat16)
    buffer[..., :dim] = torch.randn(2, 150, 6, dim)
    query, key, value = (buffer[..., :dim].transpose(1, 2)[:, 2 * n : 2 * n + 2] for n in range(3))
    check({"query": query[:, :, 10:31:7], "key": key, "value": value}, 2)
    check({"query": query[:, :, :3], "key": key.flip(0)[:, :, 1::2], "value": value[:, :, ::2]})


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("shape", [(), (1,), (4,)], ids=str)
def test_gate(shape: tuple[int, ...], wide: bool, dtype: torch.dtype, splits: int) -> None:
    gate = torch.randn(shape).to(torch.float32 if wide else dtype)
    check(draw(2, 4, 2, 2, 90, dtype=dtype) | {"gate": gate}, splits)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 30.0, -30.0])
def test_scale(scale: float) -> None:
    check(draw(2, 4, 2, 2, 140) | {"scale": scale}, 2)


def poisoned(inputs: Inputs, places: list[int], what: float) -> Inputs:
    for name in ("key", "value"):
        inputs[name][:, :, places] = what
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dim", [64, 80])
def test_hidden_nan_stays_hidden(what: float, splits: int, dim: int, dtype: torch.dtype) -> None:
    """Outside of every span, of some queries' spans, of key_valid, and of a span without keys."""
    valid = torch.ones(1, 200, dtype=torch.bool)
    valid[0, 100:110] = False
    inputs = draw(1, 4, 2, 4, 200, dim, dtype=dtype) | spans((20, 180), (0, 0), (31, 150), (120, 121))
    inputs["key_valid"] = valid
    hidden = poisoned(inputs, [0, 19, 100, 109, 180, 199], what)
    out, _ = check(hidden, splits)
    assert out.isfinite().all()
    # Seen by the first query alone: it shows there, and nowhere else.
    out, _ = check(poisoned(hidden, [25, 160, 161, 179], what), splits)
    assert out[:, :, 1:].isfinite().all() and out[:, :, 0].isnan().all()


@pytest.mark.parametrize("splits", [1, 2])
def test_visible_values_that_are_not_finite(splits: int) -> None:
    inputs = draw(1, 2, 1, 2, 100) | spans((0, 100), (50, 100))
    inputs["value"][0, 0, 10, 3] = math.nan
    inputs["value"][0, 0, 20, 5] = math.inf
    inputs["value"][0, 0, 70, 7] = -math.inf
    out, lse = check(inputs, splits)
    assert out[0, :, 0, 3].isnan().all() and (out[0, :, 0, 5] == math.inf).all() and lse.isfinite().all()
    assert out[0, :, 1, :7].isfinite().all() and (out[0, :, :, 7] == -math.inf).all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_query_that_is_not_finite(what: float, splits: int) -> None:
    inputs = draw(1, 2, 1, 3, 200) | spans((0, 150), (0, 200), (7, 7))
    inputs["query"][0, :, 0, 4] = what
    inputs["query"][0, :, 2, 4] = math.nan  # sees nothing
    out, _ = check(inputs, splits)
    assert out[0, :, 0].isnan().all() and out[0, :, 1].isfinite().all() and not out[0, :, 2].any()


@pytest.mark.parametrize("splits", [1, 3])
def test_scores_of_minus_infinity(splits: int) -> None:
    """A row all of whose visible scores are -inf gives NaN, log-sum-exp -inf; one finite score among them is enough."""
    inputs = draw(1, 2, 1, 2, 200) | {"scale": 1.0} | spans((0, 200), (0, 100))
    inputs["query"].abs_()
    inputs["key"][0, 0, :, 0] = -math.inf
    inputs["query"][0, :, :, 0] = 1.0
    out, lse = check(inputs, splits)
    assert out.isnan().all() and (lse == -math.inf).all()
    inputs["key"][0, 0, 150] = 0.5
    out, lse = check(inputs, splits)
    assert out[:, :, 0].isfinite().all() and out[:, :, 1].isnan().all()
    inputs["start"][0, 1] = inputs["end"][0, 1]
    out, _ = check(inputs, splits)
    assert not out[:, :, 1].any()


@pytest.mark.parametrize("splits", [1, 2])
def test_large_scores(splits: int) -> None:
    inputs = draw(1, 2, 1, 2, 130)
    inputs["query"] *= 100
    inputs["key"] *= 100
    out, _ = check(inputs, splits)
    assert out.isfinite().all()


def test_no_keys() -> None:
    out, lse = emulation.decode(**draw(1, 2, 1, 2, 0))
    assert not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_past_two_to_the_31(name: str, dim: int) -> None:
    """Batches, heads or rows far apart."""
    near = draw(2, 2, 2, 2, 40)
    far = far_apart(near[name], dim)
    assert torch.equal(emulation.decode(**(near | {name: far}))[0], emulation.decode(**near)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_the_emulation_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """Every 16-bit number, and what lies between, half-way and around half-way to its neighbours."""
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    exact = torch.cat([exact, exact * (1 + 2**-8), exact * (1 + 2**-9), exact * (1 + 2**-11), exact * (1 + 2**-12)])
    x = torch.cat([exact, exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(-math.inf))])
    ours = x.clone()
    emulation.library().mmk_round(ctypes.c_void_p(ours.data_ptr()), ctypes.c_int64(x.numel()), dtype == DTYPES[0])
    torch.testing.assert_close(ours, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dim", DIMS)
def test_pieces_meet_no_bank_twice(dim: int) -> None:
    """Each piece has a place of its own, and eight rows in a row have theirs in different groups of four banks."""
    offset = emulation.library().mmk_piece_offset
    places = {offset(dim, row, c) for row in range(16) for c in range(dim // 8)}
    assert places == set(range(0, 16 * dim * 2, 16))
    for first in (0, 8):
        for c in range(dim // 8):
            assert len({offset(dim, first + row, c) // 16 % 8 for row in range(8)}) == 8


# The plan. A100: 108 multiprocessors of 164 KiB; H100: 132 of 228; RTX 4090: 128 of 100.

RESIDENT = {64: 3, 80: 3, 96: 3, 128: 2}  # blocks on a multiprocessor
GPUS = {"A100": (108, 164 << 10), "H100": (132, 228 << 10), "RTX 4090": (128, 100 << 10)}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("batch", [1, 3, 8, 32, 500])
@pytest.mark.parametrize("k_len", [0, 255, 512, 4096, 131072])
def test_plan(batch: int, k_len: int, dim: int, gpu: tuple[int, int]) -> None:
    splits, blocks, merges, floats = emulation.plan(batch, 32, 8, 2, k_len, dim, *gpu)
    rows = batch * 32 * 2
    assert 1 <= splits <= 128 and (splits == 1 or k_len // splits >= 256)
    assert blocks == batch * 8 * splits
    assert (merges, floats) == ((0, 0) if splits == 1 else (-(-rows // 4), rows * splits * (dim + 2)))
    if k_len >= 131072:  # enough keys: the last wave is not mostly empty
        resident = max(1, min(RESIDENT[dim], gpu[1] // (shared_bytes(dim) + 1024)))
        room = gpu[0] * resident
        assert blocks / (-(-blocks // room) * room) >= 0.8


def shared_bytes(dim: int) -> int:
    return int(emulation.library().mmk_shared_bytes(dim))


def test_plan_of_the_benchmark() -> None:
    """B 32, 32 over 8 heads, 4096 keys on an H100: 256 blocks fill 264 places, so that nothing is split."""
    assert emulation.plan(32, 32, 8, 1, 4096, 128, *GPUS["H100"]) == [1, 256, 0, 0]


@pytest.mark.parametrize("dim", DIMS)
def test_shared_memory_fits_every_gpu_from_sm_80_on(dim: int) -> None:
    assert shared_bytes(dim) <= 99 << 10  # sm_86, sm_89, sm_120
    assert RESIDENT[dim] * (shared_bytes(dim) + 1024) <= 228 << 10


# What the backend says before it calls a kernel.


def arguments(**change: Any) -> Arguments:
    inputs: Inputs = dict.fromkeys(NAMES) | draw(1, 4, 2, 2, 30) | change
    return Arguments(**inputs, scale=1.0, dropout_p=0.0)


@pytest.fixture
def say() -> Any:
    """`why_not` of a call as on a GPU that has the extension."""
    return lambda **change: cuda._why_not_call(arguments(**change))


def test_nothing_against_what_the_kernels_take(say: Any) -> None:
    assert say() is None
    shared = draw(3, 4, 2, 2, 30, key_batch=1)
    assert say(**shared) is None
    assert say(**draw(1, 64, 8, 8, 30, 128, dtype=torch.float16)) is None
    assert say(key=torch.randn(30, 2, 1, 64).bfloat16().permute(2, 1, 0, 3)) is None
    odd = torch.empty(64 * 2 * 2 * 30, dtype=torch.bfloat16).as_strided((1, 2, 30, 64), (3, 64 * 30, 64, 1))
    assert say(key=odd) is None  # the stride of a dim of size 1 means nothing


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: draw(1, 4, 2, 9, 30), "1 to 8 queries"),
        (lambda: draw(1, 4, 2, 0, 30), "1 to 8 queries"),
        (lambda: draw(1, 4, 2, 2, 30, dtype=torch.float32), "torch.float32 is not computed"),
        (lambda: draw(1, 4, 2, 2, 30, 72), "head dims may be 64, 80, 96, 128"),
        (lambda: {"value": torch.zeros(1, 2, 30, 80)}, "head dims may be"),
        (lambda: draw(1, 72, 8, 8, 30), "64 queries times query heads"),
        (lambda: {"dense": torch.ones(1, 1, 1, 30, dtype=torch.bool)}, "a dense mask"),
        (lambda: {"bias": torch.ones(1, 1, 1, 30)}, "a bias"),
        (lambda: {"seed": torch.ones(1, dtype=torch.int64)}, "dropout"),
        (lambda: {"key": draw(1, 4, 2, 2, 30, 128)["key"][..., ::2]}, "key's rows"),
        (lambda: {"key": draw(1, 4, 2, 2, 30, 68)["key"][..., :64]}, "key's rows"),
        (lambda: {"value": draw(1, 4, 2, 2, 30, 72)["value"][..., 4:68]}, "value's rows"),
    ],
)
def test_why_not(change: Any, reason: str, say: Any) -> None:
    assert reason in say(**change())


def test_the_machine() -> None:
    """Tensors elsewhere are refused whatever the machine has; without a call, what is missing is named."""
    assert cuda.why_not(arguments()) == "the tensors are on cpu"
    if torch.version.cuda is None:
        assert cuda.why_not() == "this torch is built without CUDA"
        with pytest.raises(RuntimeError, match="built without CUDA"):
            cuda.forward(arguments())


def test_python_and_cpp_know_the_same_limits() -> None:
    library = emulation.library()
    assert tuple(d for d in range(1, 257) if library.mmk_takes_dim(d)) == cuda._DIMS
    answer = (ctypes.c_int64 * 4)()
    library.mmk_limits(answer)
    assert tuple(answer) == (cuda._QUERIES, cuda._ROWS, cuda._KEYS, cuda._OUTPUT_ROWS)


# On a GPU: what the emulation can't tell.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("q_len", [1, 3, 8])
@pytest.mark.parametrize(("batch", "k_len"), [(1, 4000), (40, 600), (3, 40)])
def test_on_a_gpu(batch: int, k_len: int, q_len: int, dim: int, dtype: torch.dtype) -> None:
    if cuda.why_not() is not None:
        pytest.skip(str(cuda.why_not()))
    inputs = draw(batch, 8, 2, q_len, k_len, dim, dtype=dtype)
    inputs |= spans(*((k_len // 8 * i, k_len // 2 + k_len // 16 * i) for i in range(q_len)))
    inputs |= {"key_valid": torch.rand(batch, k_len) < 0.9, "gate": torch.randn(8)}
    hidden = ~inputs["key_valid"][:, None, :, None]
    inputs["key"], inputs["value"] = (inputs[name].masked_fill(hidden, math.nan) for name in ("key", "value"))
    on_gpu = {name: None if (x := inputs.get(name)) is None else x.cuda() for name in NAMES}
    args = Arguments(**on_gpu, scale=dim**-0.5, dropout_p=0.0)
    assert cuda.why_not(args) is None
    first, again = (cuda.forward(args) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    compare(inputs, tuple(x.cpu() for x in first))
