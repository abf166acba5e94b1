"""How many tokens TokenReducer leaves of any grid, the texts that name reducers, and bad input."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from harness import examples
from hypothesis import given
from hypothesis import strategies as st
from module_checks import refused

from mmkernels.nn import TokenReducer

C = 4
KINDS = ("pool", "shuffle", "perceiver", "tome", "select", "diverse")

sides = st.one_of(st.integers(1, 9), st.integers(1, 10_000))
grids = st.one_of(
    st.lists(st.tuples(st.integers(1, 40), sides, sides), max_size=6),
    st.tuples(sides, st.just(1), st.just(1)).map(lambda size: [size]),
    st.just([(1, 1, 10_000)]),
    st.just([(1, 24, 24)] * 200),
)
small_grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), max_size=4)


def _reducer(kind: str, budget: int, protect: int) -> TokenReducer:
    reducer = TokenReducer.parse(f"{kind}:<={budget}", C, protect=protect) if kind != "perceiver" else None
    return reducer or TokenReducer("perceiver", C, budget=budget, protect=protect, depth=1, num_heads=1)


@pytest.mark.parametrize("kind", KINDS)
@given(grid=grids, budget=st.integers(1, 5_000), protect=st.integers(0, 5))
def test_no_image_has_more_tokens_than_the_budget(kind: str, grid: Any, budget: int, protect: int) -> None:
    if kind == "perceiver":
        budget = min(budget, 50)  # latents are memory
    tokens = _reducer(kind, budget + protect, protect).tokens(grid)
    assert len(tokens) == len(grid)
    for count, size in zip(tokens, grid, strict=True):
        assert protect < count <= budget + protect
        if kind in ("tome", "select", "diverse"):
            assert count == min(prod(size), budget) + protect
        if kind == "pool" and prod(size) <= budget:
            assert count == prod(size) + protect


@pytest.mark.parametrize("kind", KINDS)
@examples(25)
@given(grid=small_grids, budget=st.integers(1, 40), protect=st.integers(0, 2), batched=st.booleans())
def test_tokens_is_what_comes_out(kind: str, grid: Any, budget: int, protect: int, batched: bool) -> None:
    reducer = _reducer(kind, budget + protect, protect)
    batched = batched and bool(grid)
    tokens = sum(prod(size) + protect for size in (grid[:1] if batched else grid))
    x = torch.randn(*([2] * batched), tokens, C)
    scores = torch.randn(x.shape[:-1]) if reducer.uses_scores else None
    out = reducer(x, grid[0] if batched else grid, scores=scores)
    counts = reducer.tokens(grid[:1] if batched else grid)
    assert out.lengths == (counts[0] if batched else counts)
    assert out.x.shape == ((2, counts[0], C) if batched else (sum(counts), C))
    if out.grid is not None:
        grids = [out.grid] if batched else out.grid
        assert tuple(prod(size) + protect for size in grids) == counts


@given(size=st.tuples(st.integers(1, 50), sides, sides), budget=st.integers(1, 5_000))
def test_a_budget_keeps_frames_and_aspect(size: tuple[int, int, int], budget: int) -> None:
    """A side is the shorter one of a rectangle of the same aspect with the budget as area; no more fits beside it."""
    t, h, w = size
    new = _new_grid(size, budget)
    if prod(size) <= budget:
        assert new == size
        return
    assert new[0] == min(t, budget)
    area = budget // t
    if area == 0:
        assert new == (budget, 1, 1)
        return
    assert h == w or new[1] == new[2] or (new[1] < new[2]) == (h < w)
    exact = (area * min(h, w) / max(h, w)) ** 0.5
    fits = lambda one, other: (abs(one - exact) <= 0.5 + 1e-9 or one == 1) and other == min(max(h, w), area // one)
    assert fits(*new[1:]) or fits(*new[:0:-1])  # where the exact side is 1.5, both 1 and 2 are the nearest


def _new_grid(size: tuple[int, int, int], budget: int) -> tuple[int, ...]:
    """Returns the grid without pooling tokens that would not fit into memory."""
    from mmkernels.nn.token_images import fit_grid

    return fit_grid(size, budget)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("none", (577, 25)),
        ("pool:2", (145, 7)),
        ("pool:5", (26, 3)),
        ("pool:<=257", (257, 25)),
        ("shuffle:2", (145, 7)),
        ("shuffle:<=101", (101, 7)),
        ("perceiver:64", (65, 65)),
        ("perceiver:<=64", (64, 64)),
        ("tome:0.5", (289, 13)),
        ("tome:24", (25, 25)),
        ("tome:<=64", (64, 25)),
        ("select:0.3", (174, 9)),
        ("select:0.1", (59, 4)),
        ("diverse:1.0", (577, 25)),
        ("diverse:1", (2, 2)),
    ],
)
def test_texts(text: str, tokens: tuple[int, int]) -> None:
    """Of two photos with a class token each; a share of the patches is rounded up."""
    reducer = TokenReducer.parse(text, 8, protect=1)
    assert reducer.tokens([(1, 24, 24), (1, 4, 6)]) == tokens
    assert reducer.tokens((1, 24, 24)) == tokens[:1]
    assert reducer.tokens(torch.tensor([[1, 24, 24], [1, 4, 6]])) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "mean", "none:2", "none:", "pool", "pool:", "pool:two", "pool:2.5.1", "pool:<=", "pool:<=a", "pool=2",
     ":2", "tome:half", None, 3],
)  # fmt: skip
def test_texts_that_name_no_reducer(text: Any) -> None:
    with pytest.raises(ValueError, match=r'a reducer must be "none", "pool:2", .*, got '):
        TokenReducer.parse(text, 8)


def test_the_representation_says_what_it_does() -> None:
    assert repr(TokenReducer("pool", window=2)) == "TokenReducer('pool', window=(1, 2, 2))"
    selecting = TokenReducer.parse("diverse:<=64", 8, protect=1)
    assert selecting.extra_repr() == "'select', budget=64, protect=1, scorer='diverse'"


def test_bad_options() -> None:
    amount = r"window or budget must be given for kind 'pool', and nothing else, got "
    refused(
        [
            (lambda: TokenReducer("mean"), ValueError, "kind must be one of none, pool, .*, got 'mean'"),
            (lambda: TokenReducer("none", budget=4), ValueError, "budget must be None for kind 'none', got 4"),
            (lambda: TokenReducer("pool"), ValueError, amount + "none"),
            (lambda: TokenReducer("pool", keep=4), ValueError, amount + "keep"),
            (lambda: TokenReducer("pool", window=2, budget=4), ValueError, amount + "window, budget"),
            (lambda: TokenReducer("tome", window=2), ValueError, "keep or budget must be given for kind 'tome'"),
            (lambda: TokenReducer("pool", window=0), ValueError, "window must be a positive integer, got 0"),
            (lambda: TokenReducer("pool", window=(2, 2)), ValueError, r"window must be \(t, h, w\), got 2 numbers"),
            (lambda: TokenReducer("tome", keep=0), ValueError, "keep must be 1 or more, or a share .*, got 0"),
            (lambda: TokenReducer("tome", keep=1.5), ValueError, "keep must be 1 or more, or a share .*, got 1.5"),
            (lambda: TokenReducer("tome", keep=-0.5), ValueError, "keep must be 1 or more, or a share .*, got -0.5"),
            (lambda: TokenReducer("tome", keep=float("nan")), ValueError, "keep must be 1 or more, .*, got nan"),
            (lambda: TokenReducer("tome", keep="4"), TypeError, "keep must be an integer, or a share .*, got str"),
            (lambda: TokenReducer("perceiver", C, keep=0.5), TypeError, "keep must be an integer, got float"),
            (lambda: TokenReducer("tome", budget=0), ValueError, "budget must be an integer above protect = 0, got 0"),
            (lambda: TokenReducer("tome", budget=1.5), ValueError, "budget must be an integer above .*, got 1.5"),
            (lambda: TokenReducer("tome", budget=2, protect=2), ValueError, "budget must be .* protect = 2, got 2"),
            (lambda: TokenReducer("none", protect=-1), ValueError, "protect must be 0 or more, got -1"),
            (lambda: TokenReducer("none", protect=1.0), TypeError, "protect must be an integer, .*, got float"),
            (lambda: TokenReducer("none", 0), ValueError, "dim must be a positive integer, got 0"),
            (lambda: TokenReducer("shuffle", window=2), ValueError, "dim must be given for kind 'shuffle', which has"),
            (lambda: TokenReducer("perceiver", keep=2), ValueError, "dim must be given for kind 'perceiver'"),
            (lambda: TokenReducer("tome", keep=2, scorer="diverse"), ValueError, "scorer must be one of scores, got"),
            (
                lambda: TokenReducer("select", keep=2, scorer="text"),
                ValueError,
                "scorer must be one of scores, diverse",
            ),
            (lambda: TokenReducer("tome", keep=2, depth=2), TypeError, "depth must not be given for kind 'tome'"),
            (
                lambda: TokenReducer("select", keep=2, merge=True),
                TypeError,
                "merge must not be given for kind 'select'",
            ),
            (lambda: TokenReducer("pool", window=2, mode="min"), ValueError, "mode must be one of mean, .*, got 'min'"),
            (lambda: TokenReducer("pool", window=2, mode="bicubic"), ValueError, "mode must be one of mean, max, got"),
            (
                lambda: TokenReducer("select", keep=2, scorer="diverse", method="max"),
                ValueError,
                "method must be determinant or distance, got 'max'",
            ),
            (lambda: TokenReducer("tome", budget=True), ValueError, "budget must be an integer above .*, got True"),
            (
                lambda: TokenReducer("select", keep=2, scorer="diverse", merge_rest="prumerge"),
                ValueError,
                "merge_rest must be one of False, True, mean, visionzip, got 'prumerge'",
            ),
            (
                lambda: TokenReducer("select", keep=2, method="distance"),
                TypeError,
                "method must not be given for kind 'select'",
            ),
        ]
    )


def test_bad_inputs() -> None:
    pool, tome, select = (
        TokenReducer("pool", 4, window=2, protect=1),
        TokenReducer("tome", keep=6),
        _reducer("select", 3, 0),
    )
    x, grid, scores = torch.randn(10, 4), [(1, 2, 2), (1, 1, 4)], torch.rand(8)
    bare, one = x[:8], torch.randn(2, 4, 4)
    off = "got 8 in 2 images"
    refused(
        [
            (lambda: pool(bare, grid), ValueError, r"grid with 1 protected tokens .* must match x's 8 tokens, got 10"),
            (lambda: tome(x, grid), ValueError, f"grid must match x's 10 tokens, {off}"),
            (lambda: pool(one, (1, 2, 2)), ValueError, "grid with 1 .* must match x's 4 tokens an image, got 5 in 0"),
            (lambda: pool(x[..., :3], grid), ValueError, r"x must be \[tokens, 4\] or .*, got shape \(10, 3\)"),
            (lambda: pool(x[None, None], grid), ValueError, r"x must be \[tokens, C\] or \[images, tokens, C\], got"),
            (lambda: pool(x.long(), grid), TypeError, "x must be float16, .*, got torch.int64"),
            (lambda: pool(x, [(1, 2)]), ValueError, r"grid must be \(t, h, w\) for each image, got \(1, 2\)"),
            (lambda: pool(x, [(1, 0, 2)]), ValueError, "grid must be 1 or more, got 0"),
            (lambda: pool(x, torch.ones(2, 3)), TypeError, "grid must be integers, .*, got torch.float32"),
            (lambda: pool.tokens([(1, 2)]), ValueError, r"grid must be \(t, h, w\) for each image, got \(1, 2\)"),
            (lambda: pool.tokens((1, 2)), ValueError, r"grid must be \(t, h, w\) for each image, got 2 numbers"),
            (lambda: tome(bare, grid), ValueError, "keep must be from 1 to 4 for image 0 of 4 tokens, got 6"),
            (lambda: tome.tokens(grid), ValueError, "keep must be from 1 to 4 for image 0 of 4 tokens, got 6"),
            (
                lambda: TokenReducer("pool", window=2)(torch.randn(2, 12, 4), [(1, 2, 6), (1, 3, 4)]),
                ValueError,
                r"grid must leave all images of \[images, tokens, C\] as many tokens, got \(3, 4\)",
            ),
            (lambda: select(bare, grid), ValueError, 'scores must be given for the scorer "scores"'),
            (
                lambda: pool(x, grid, scores=x[:, 0]),
                ValueError,
                "scores must be None for TokenReducer.'pool', .*not use",
            ),
            (lambda: pool(x, grid, metric=x), ValueError, "metric must be None for TokenReducer.'pool'"),
            (lambda: select(bare, grid, scores=scores, metric=bare), ValueError, "metric must be None for .*'select'"),
            (
                lambda: select(bare, grid, scores=scores[:6]),
                ValueError,
                r"scores must be \[8\], one for each token, got",
            ),
            (lambda: select(one, (1, 2, 2), scores=scores), ValueError, r"scores must be \[2, 4\], one for each token"),
            (
                lambda: select(bare, grid, scores=scores.long()),
                TypeError,
                "scores must be float16, .*, got torch.int64",
            ),
            (lambda: select(bare, grid, scores=scores.to("meta")), ValueError, "scores must be on x's device cpu, got"),
            (lambda: TokenReducer("tome", keep=2)(bare, grid, metric=scores), ValueError, r"metric must be \[8, D\]"),
        ]
    )


def test_one_patch_and_more_columns_than_a_budget() -> None:
    x = torch.randn(10_001, C)
    for kind in ("pool", "shuffle", "tome", "diverse"):
        reducer = _reducer(kind, 7, 0)
        out = reducer(x, [(1, 1, 10_000), (1, 1, 1)])
        assert out.lengths == (7, 1), kind
        if kind != "shuffle":
            torch.testing.assert_close(out.x[-1], x[-1], msg=kind)


def test_two_hundred_images() -> None:
    grid = [(1, 1 + n % 5, 2 + n % 7) for n in range(200)]
    x = torch.randn(sum(map(prod, grid)) + 200, C)
    for kind in KINDS:
        reducer = _reducer(kind, 6, 1)
        out = reducer(x, grid, scores=torch.rand(len(x)) if kind == "select" else None)
        assert out.x.shape == (sum(reducer.tokens(grid)), C)
        first = torch.tensor((0, *out.lengths[:-1])).cumsum(0)
        starts = torch.tensor([0, *(prod(size) + 1 for size in grid[:-1])]).cumsum(0)
        assert torch.equal(out.x[first], x[starts]), kind
