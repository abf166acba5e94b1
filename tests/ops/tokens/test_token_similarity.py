"""`token_similarity`: by hand, one pair after the other, far from 1, NaN, in views, and on bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, backends, each_backend, examples, generator, peak_of
from hypothesis import given
from hypothesis import strategies as st
from ops.cpu_tools import each_dtype, each_isa, needs_kernels
from torch import Tensor

from mmkernels import select_diverse, select_tokens, token_similarity
from mmkernels.ops.tokens.token_similarity import chunked
from mmkernels.runtime import cpu

NAN, INF = math.nan, math.inf
REDUCTIONS = ("mean", "max", "min")

every_backend = each_backend("token_similarity")
each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)


def _by_pairs(x: Tensor, lengths: list[int], others: Tensor, counts: list[int], reduce: str) -> Tensor:
    """One token after the other."""
    of = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[reduce]
    parts = [
        of(F.cosine_similarity(token[None], those, dim=1, eps=0.0))
        for tokens, those in zip(x.split(lengths), others.split(counts), strict=True)
        for token in tokens
    ]
    return torch.stack(parts) if parts else x[:, 0]


@every_backend
@pytest.mark.parametrize(
    ("reduce", "want"), [("mean", [0.35, 0.0, -0.35]), ("max", [1, 0, 0.3]), ("min", [-0.3, 0, -1])]
)
def test_by_hand(backend: str, reduce: str, want: list[float]) -> None:
    """Others that point to 0 and to about 107 degrees (a cosine of -0.3); then one that is the token turned around."""
    others = torch.tensor([[2.0, 0.0], [-0.3, math.sqrt(1 - 0.09)], [0.0, 1.0]])
    x = torch.tensor([[7.0, 0.0], [0.0, 0.0], [-1e3, 0.0], [0.0, -3.0]])
    found = token_similarity(x, [3, 1], others, [2, 1], reduce=reduce, backend=backend)
    torch.testing.assert_close(found, torch.tensor([*want, -1.0]).float())


@every_backend
@examples(40, interpreted=2)
@given(
    images=st.lists(st.tuples(st.sampled_from([0, 1, 7, 30, 75]), st.sampled_from([1, 2, 20, 70, 130])), max_size=4),
    reduce=st.sampled_from(REDUCTIONS),
    channels=st.sampled_from([1, 5, 40, 130]),
    number=st.integers(0, 1000),
)
def test_against_one_pair_after_the_other(
    backend: str, images: list[tuple[int, int]], reduce: str, channels: int, number: int
) -> None:
    random = generator(number)
    lengths, counts = [n for n, _ in images], [m for _, m in images]
    x, others = (torch.randn(sum(sizes), channels, generator=random) for sizes in (lengths, counts))
    found = token_similarity(x, lengths, others, counts, reduce=reduce, backend=backend)
    want = _by_pairs(x.double(), lengths, others.double(), counts, reduce).float()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@every_backend
@each_reduction
def test_what_is_not_finite(backend: str, reduce: str) -> None:
    """A token is NaN alone; one other makes its image's tokens NaN, those of zeros too; other images see nothing."""
    for bad in (NAN, INF, -INF):
        x, others = torch.ones(9, 20), torch.ones(5, 20)
        x[1, 3], x[2], others[3, 19] = bad, 0, bad
        x[6] = 0
        found = token_similarity(x, (4, 4, 1), others, (2, 2, 1), reduce=reduce, backend=backend)
        want = torch.tensor([1, NAN, 0, 1, NAN, NAN, NAN, NAN, 1])
        torch.testing.assert_close(found, want, equal_nan=True)


@every_backend
@each_reduction
def test_how_large_rows_are_does_not_matter(backend: str, reduce: str) -> None:
    """Nor whether their squares are floats. On "triton" products of two rows must be, where all are computed."""
    random = generator()
    x, others = torch.randn(40, 24, generator=random), torch.randn(9, 24, generator=random)
    most = 14 if backend == "triton" and reduce != "mean" else 30
    powers = torch.randint(-most, most + 1, (49, 1), generator=random).double()
    sizes = 10**powers
    more: dict[str, Any] = {"lengths": [40], "other_lengths": [9], "reduce": reduce, "backend": backend}
    found = token_similarity((x * sizes[:40]).float(), others=(others * sizes[40:]).float(), **more)
    torch.testing.assert_close(found, token_similarity(x, others=others, **more))


@every_backend
@each_reduction
def test_no_images(backend: str, reduce: str) -> None:
    packed = token_similarity(torch.ones(0, 8), [], torch.ones(0, 8), [], reduce=reduce, backend=backend)
    assert packed.shape == (0,)
    batched = token_similarity(torch.ones(0, 5, 8), 5, torch.ones(0, 3, 8), 3, reduce=reduce, backend=backend)
    assert batched.shape == (0, 5)


@every_backend
def test_a_token_that_is_there_twice(backend: str) -> None:
    x = torch.randn(100, 64, generator=generator())
    found = token_similarity(x, [100], 3 * x[17:80], [63], reduce="max", backend=backend)
    torch.testing.assert_close(found[17:80], torch.ones(63), rtol=0, atol=5e-7)
    assert found[:17].max() < 0.9 and found[80:].max() < 0.9


@needs_kernels
@each_isa
@each_dtype
@pytest.mark.parametrize("channels", [3, 64, 1001])
def test_tiles_of_every_instruction_set(isa: str, dtype: torch.dtype, channels: int) -> None:
    """More others than a panel, more tokens than a tile, channels that no vector divides."""
    random = generator()
    x, others = (torch.randn(rows, channels, generator=random).to(dtype) for rows in (270, 180))
    lengths, counts = (200, 70), (130, 50)
    for reduce in REDUCTIONS:
        with cpu.use_isa(isa):
            found = token_similarity(x, lengths, others, counts, reduce=reduce, backend="cpu")
        want = token_similarity(x.double(), lengths, others.double(), counts, reduce=reduce).float()
        torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


@needs_kernels
@each_reduction
def test_the_result_does_not_depend_on_the_threads(reduce: str) -> None:
    random = generator()
    x, others = torch.randn(700, 256, generator=random), torch.randn(300, 256, generator=random)
    call = lambda: token_similarity(x, (500, 200), others, (290, 10), reduce=reduce, backend="cpu")
    alone = call()
    torch.set_num_threads(4)
    assert torch.equal(call(), alone)


@each_reduction
def test_strips_of_tokens(monkeypatch: pytest.MonkeyPatch, reduce: str) -> None:
    x, others = torch.randn(100, 16, dtype=torch.float64), torch.randn(30, 16, dtype=torch.float64)
    more: dict[str, Any] = {"lengths": (60, 40), "others": others, "other_lengths": (10, 20), "reduce": reduce}
    monkeypatch.setattr(chunked, "STRIP_BYTES", 500)
    torch.testing.assert_close(
        token_similarity(x, backend="chunked", **more), token_similarity(x, backend="reference", **more)
    )


@every_backend
@each_reduction
def test_views_are_read_in_place(backend: str, reduce: str) -> None:
    random = generator()
    x, others = torch.randn(2, 13, 10, generator=random), torch.randn(2, 5, 10, generator=random)
    call = lambda x, others: token_similarity(x, x.shape[1], others, others.shape[1], reduce=reduce, backend=backend)
    views = (
        (x[:, 1:], others[:, 2:]),
        (x[:, 1:, ::2], others.mT.contiguous().mT[..., ::2]),
        (x[:1, 1:].expand(2, 12, 10), others[:1].expand(2, 5, 10)),
    )
    for tokens, those in views:
        want = call(tokens.contiguous(), those.contiguous())
        assert want.shape == (2, 12)
        torch.testing.assert_close(call(tokens, those), want)
        packed = token_similarity(tokens.flatten(0, 1), [12, 12], those, those.shape[1], reduce=reduce, backend=backend)
        torch.testing.assert_close(packed, want.flatten())


@each_backend("token_similarity", interpreted=False)
@each_reduction
def test_many_images_and_a_large_one(backend: str, reduce: str) -> None:
    for lengths, counts in (((31, 40) * 100, (3, 1) * 100), ((10_000,), (300,)), ((0, 5), (0, 2)), ((0,), (0,))):
        x, others = torch.randn(sum(lengths), 8), torch.randn(sum(counts), 8)
        found = token_similarity(x, lengths, others, counts, reduce=reduce, backend=backend)
        want = token_similarity(x.double(), lengths, others.double(), counts, reduce=reduce, backend="reference")
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-6)


@pytest.mark.alone
@pytest.mark.parametrize(
    "backend", [name for name in ("cpu", "chunked") if name in backends(SPECS["token_similarity"])]
)
@each_reduction
def test_similarities_take_no_memory(backend: str, reduce: str) -> None:
    x, others = torch.randn(8192, 16), torch.randn(4096, 16)
    run = lambda: token_similarity(x, [8192], others, [4096], reduce=reduce, backend=backend)
    assert peak_of(run) < 0.2 * 8192 * 4096 * 4


def test_dtypes_and_no_gradient() -> None:
    x, others = torch.randn(12, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ):
        found = token_similarity(x.to(dtype), torch.tensor([12]), others.to(dtype), torch.tensor([3]))
        assert found.dtype == wide and not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_similarity(x, [12], others, [3])
        mixed = token_similarity(x, [12], others.bfloat16(), [3])  # as a layer makes them
    assert torch.equal(rounded, token_similarity(x, [12], others, [3]))
    assert torch.equal(mixed, token_similarity(x, [12], others.bfloat16().float(), [3]))


def test_dart_and_cdpruner_in_a_few_lines() -> None:
    """Pivots and what duplicates them least; relevance to a question as the quality of a diverse selection."""
    x, words = torch.randn(60, 32), torch.randn(5, 32)
    pivots = x.norm(dim=1).topk(4).indices
    duplication = token_similarity(x, [60], x[pivots], [4], reduce="max")
    kept = select_tokens(x, [60], 20, -duplication.index_fill(0, pivots, -INF)).positions
    cosines = F.normalize(x, dim=1) @ F.normalize(x[pivots], dim=1).mT
    best = cosines.amax(1).index_fill(0, pivots, -INF).argsort()[:20]
    assert torch.equal(kept, best.sort().values)
    relevance = token_similarity(x, [60], words, [5])
    scaled = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    assert len(set(select_diverse(x, [60], 15, quality=scaled).tolist())) == 15


GOOD: dict[str, Any] = {"x": torch.zeros(9, 4), "lengths": (4, 5), "others": torch.ones(3, 4), "other_lengths": (1, 2)}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"x": torch.zeros(9, 4).int()}, TypeError, "x must be float16.*got torch.int32"),
    "one dim": (
        {"x": torch.zeros(9)},
        ValueError,
        r"x must be \[tokens, C\] or \[images, tokens, C\], got shape \(9,\)",
    ),
    "no channels": ({"x": torch.zeros(9, 0)}, ValueError, r"x must have at least one channel, got shape \(9, 0\)"),
    "lengths": ({"lengths": (4, 4)}, ValueError, "lengths must match x's 9 tokens, got 8 in 2 images"),
    "negative": ({"lengths": (-1, 10)}, ValueError, "lengths must be 0 or more, got -1"),
    "floats": ({"lengths": (4.0, 5.0)}, TypeError, "lengths must be integers, the tokens of each image, got float"),
    "no tensor": ({"others": None}, TypeError, "others must be a tensor, got NoneType"),
    "others' dims": (
        {"others": torch.ones(3)},
        ValueError,
        r"others must be \[tokens, C\] or \[images, tokens, C\], got shape \(3,\)",
    ),
    "others' dtype": (
        {"others": torch.ones(3, 4).half()},
        TypeError,
        "others must have x's dtype torch.float32, got torch.float16",
    ),
    "others' device": (
        {"others": torch.ones(3, 4, device="meta")},
        ValueError,
        "others must be on x's device cpu, got meta",
    ),
    "others' channels": (
        {"others": torch.ones(3, 5)},
        ValueError,
        r"others must have x's 4 channels, got shape \(3, 5\)",
    ),
    "other lengths": (
        {"other_lengths": (1, 1)},
        ValueError,
        "other_lengths must match others's 3 tokens, got 2 in 2 images",
    ),
    "other images": ({"other_lengths": (3,)}, ValueError, "other_lengths must be for x's 2 images, got 1"),
    "other floats": (
        {"other_lengths": (1.0, 2.0)},
        TypeError,
        "other_lengths must be integers, the tokens of each image, got float",
    ),
    "nothing to compare with": (
        {"other_lengths": (3, 0)},
        ValueError,
        "other_lengths must be 1 or more for image 1, which has tokens, got 0",
    ),
    "reduce": ({"reduce": "sum"}, ValueError, "reduce must be one of mean, max, min, got 'sum'"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of .*, or None; got 'gpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        token_similarity(**GOOD | change)
