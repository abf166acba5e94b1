"""The contrastive ops' C++ kernels on numbers far apart, NaN and inf, and called by hand with what does not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import generator, name_of
from ops.contrastive.cpu_tools import SCALES, WAYS, case_of, check_kernel, check_scale_s_gradient, each_way
from ops.contrastive.tools import features
from ops.cpu_tools import each_isa, needs_kernels
from pairwise import parametrize
from torch import Tensor

from mmkernels import info_nce
from mmkernels.runtime import cpu
from mmkernels.spec import Case, Inputs, cast

pytestmark = needs_kernels

NAN, INF = math.nan, math.inf


# Logits far apart in one tile, where one exponential for both directions would not do.


SCALE = 1.7  # at which a logit is rounded, as it would be in any other problem


def _of_logits(logits: Tensor, hard: Tensor, **more: Any) -> Inputs:
    """Features whose logits are these: texts are unit vectors."""
    m = logits.shape[1]
    unit = torch.eye(m + hard.shape[1], dtype=torch.float64)
    inputs = {"image": torch.cat([logits, hard], 1).double() / SCALE, "text": unit[:m], "hard_texts": unit[m:]}
    return inputs | {"logit_scale": torch.tensor(SCALE, dtype=torch.float64), "reduction": "none"} | more


def _far_apart(kind: str, distance: int) -> Case:
    """Logits near -100 and some others, in two panels of images, one ragged, and two blocks of texts.

    Where the distance is 85, some exponentials relative to a tile's largest logit are nothing, from 100 on whole sums.
    """
    # logit_scale's gradient is one sum whose terms cancel: there the reference's error, which is the measure, is luck.
    grads = ("image", "text", "hard_texts")
    return case_of(f"{kind} by {distance}", lambda number: _by_distance(kind, distance, number), grads)


def _by_distance(kind: str, distance: int, number: int) -> Inputs:
    g, hidden = generator(number), kind == "a hidden pair above"
    n, m = 70, 70 if hidden else 140
    # Within 2 of -100, and 1 where a row has five only: each row and column has one near the largest.
    logits, hard = (w * (2 * torch.rand(n, k, generator=g, dtype=torch.float64) - 1) - 100 for k, w in ((m, 2), (5, 1)))
    ids = {"image_ids": torch.arange(n), "text_ids": torch.arange(m) % n}
    options: Inputs = {}
    if hidden:
        ids = dict.fromkeys(ids, torch.arange(n).index_fill_(0, torch.tensor([3, 40, 67]), 99))
        logits[3, 40] += distance
        logits[67, 3] += distance
        options = {"same_id": "ignore", "label_smoothing": 0.1}
    if kind in ("a pair above", "all of it"):
        logits[40, 77] += distance
        logits[68, 5] += distance
    if kind in ("images below", "all of it"):
        logits[[3, 66]] -= distance
        hard[[3, 66]] -= distance
    if kind in ("texts below", "all of it"):
        logits[:, [5, 69, 133]] -= distance
    if kind == "a hard pair above":
        hard[9, 2] += distance
    # What the fast path alone would make of the first tile, with the kernels' exponential: nothing below 2^-126.
    tile = (hard if kind == "a hard pair above" else logits)[:64, :128]
    relative = (tile - tile.max()).exp()
    sums = relative.where(relative >= 2.0**-126, 0.0)
    nothing = [bool((sums.sum(dim) == 0).any()) for dim in (0, 1)]
    assert any(nothing) == ((2 if kind == "all of it" else 1) * distance >= 100)
    return _of_logits(logits, hard, **ids, **options)


FAR_APART = {
    (kind, distance): _far_apart(kind, distance)
    for kind in (
        "a pair above",
        "images below",
        "texts below",
        "all of it",
        "a hard pair above",
        "a hidden pair above",
    )
    for distance in (50, 65, 85, 100, 240)
}


@parametrize(
    "isa, dtype, kind, distance",
    [(*way, *place) for way in WAYS for place in FAR_APART],
    lambda row: {"way": row[:2], "kind": row[2], "distance": row[3]},
    ids=lambda row: f"{row[0]}-{name_of(row[1])}-{row[2]} by {row[3]}",
)
def test_logits_far_apart_in_a_tile(isa: str, dtype: torch.dtype, kind: str, distance: int) -> None:
    with cpu.use_isa(isa):
        check_kernel(FAR_APART[kind, distance], dtype)


def _thousands(smoothing: float) -> Case:
    def problem(number: int) -> Inputs:
        g = generator(number)
        logits, hard = (1e4 * torch.rand(150, k, generator=g, dtype=torch.float64) - 5e3 for k in (150, 20))
        for x in (logits, hard):  # twins contend for each softmax: else the few rows that have any decide by luck
            x[:, 1::2] = x[:, ::2] + torch.randn(x[:, ::2].shape, generator=g, dtype=torch.float64)
        return _of_logits(logits, hard, label_smoothing=smoothing)

    return case_of(f"thousands, smoothed by {smoothing}", problem)


THOUSANDS = [_thousands(smoothing) for smoothing in (0.0, 0.25)]


@each_isa
@pytest.mark.parametrize("case", THOUSANDS, ids=[case.id for case in THOUSANDS])
def test_logits_of_thousands(isa: str, case: Case) -> None:
    """Each row's softmax is shared by two texts at most, and tasks' sums are far apart where they meet."""
    with cpu.use_isa(isa):
        check_kernel(case, torch.float32, threads=2)


@each_isa
@pytest.mark.parametrize("exponent", [6, 7, 8, 9, 10, 15, 16, 23, 30, 35])
def test_logits_beyond_what_float32_has_fractions_for(isa: str, exponent: int) -> None:
    """Losses are differences of logits, which are right to the rounding of a dot; nothing overflows below inf."""
    for scale in (10.0**exponent, -(10.0**exponent)):
        inputs = cast(features(130, dim=16, scale=scale, seed=exponent) | {"reduction": "none"}, torch.float32)
        leaves = [inputs[name].requires_grad_() for name in ("image", "text", "logit_scale")]
        with cpu.use_isa(isa):
            found = info_nce(**inputs, backend="cpu")
            grads = torch.autograd.grad(found[0].sum() + found[1].sum(), leaves)
        want = info_nce(**cast(inputs, torch.float64), backend="reference")
        for mine, true in zip(found, want, strict=True):
            assert float((mine - true).detach().abs().max()) <= 2 * 16 * torch.finfo(torch.float32).eps * abs(scale)
        assert all(bool(x.isfinite().all()) for x in grads)


@each_isa
@pytest.mark.parametrize("kind", SCALES)
def test_the_scale_s_gradient_in_the_root_mean_square(isa: str, kind: str) -> None:
    """One sum, whose error in a single draw may be luck, the naive formula's too."""
    with cpu.use_isa(isa):
        check_scale_s_gradient(kind)


# NaN and inf.


def _clean(number: int = 0) -> Inputs:
    """Positive features of an odd dim, in several panels, blocks and tasks, which a bad one shares with good ones."""
    inputs = features(70, 140, 31, seed=number) | {"hard_texts": features(20, dim=31, seed=number + 1)["text"]}
    ids = {"image_ids": torch.arange(70) % 30, "text_ids": torch.arange(140) % 40}
    return {name: x.abs() for name, x in inputs.items()} | ids | {"reduction": "none"}


def _spoiled(name: str, place: int, bad: float) -> Case:
    def problem(number: int) -> Inputs:
        inputs = _clean(number)
        inputs[name][place, -1] = bad
        return inputs

    return case_of(f"{bad} in {name} {place}", problem, ())


def _left_out(smoothing: float, bad: float) -> Case:
    """Image 66, which is bad, shares an id with texts 3, 65 and 69: no softmax but its own has it."""
    numbers = torch.arange(70).index_fill_(0, torch.tensor([3, 65, 66, 69]), 99)
    options = {"same_id": "ignore", "label_smoothing": smoothing, "image_ids": numbers, "text_ids": numbers}

    def problem(number: int) -> Inputs:
        inputs = {name: x.abs() for name, x in features(70, dim=15, seed=number).items()}
        inputs["image"][66, 0] = bad
        return inputs | options | {"reduction": "none"}

    return case_of(f"{bad} left out, smoothed by {smoothing}", problem, ())


SPOILED = {
    (name, place, bad): _spoiled(name, place, bad)
    for name, places in {"image": (0, 40, 69), "text": (0, 71, 139), "hard_texts": (0, 7, 19)}.items()
    for place in places
    for bad in (NAN, INF, -INF)
}
SPOILED |= {("left out", smoothing, bad): _left_out(smoothing, bad) for smoothing in (0.0, 0.1) for bad in (NAN, INF)}


@parametrize(
    "isa, dtype, name, place, bad",
    [(*way, *spoiled) for way in WAYS for spoiled in SPOILED],
    lambda row: {"way": row[:2], "place": row[2:4], "bad": str(row[4])},
    ids=lambda row: f"{row[0]}-{name_of(row[1])}-{row[2]}-{row[3]}-{row[4]}",
)
def test_rows_that_see_a_bad_feature_are_lost_and_no_other(
    isa: str, dtype: torch.dtype, name: str, place: float, bad: float
) -> None:
    """As in the reference, of which test_contrastive_extremes.py says which rows these are."""
    with cpu.use_isa(isa):
        check_kernel(SPOILED[name, place, bad], dtype, threads=2)


@each_way
def test_all_is_minus_infinity(isa: str, dtype: torch.dtype) -> None:
    """No row has a probability for anything: NaN in each, and a backward pass that ends."""
    x = torch.full((70, 5), INF).to(dtype).requires_grad_()
    with cpu.use_isa(isa):
        losses = info_nce(x, x, -1.0, hard_texts=x, reduction="none", backend="cpu")
        (grad,) = torch.autograd.grad(losses[0].sum() + losses[1].sum(), x)
    assert all(bool(x.isnan().all()) for x in losses) and grad.shape == x.shape


def test_ids_of_any_size() -> None:
    """Neighbours at both ends of int64, and numbers that only differ beyond 32 bits and beyond a double's 53."""
    large = torch.tensor([2**63 - 1, 2**63 - 2, -(2**63), 1 - 2**63, 2**32 + 5, 5, 2**53, 2**53 + 1, -1, 0])
    inputs = cast(features(10) | {"reduction": "none"}, torch.float32)
    for options in ({}, {"same_id": "ignore"}):
        found, want = (
            info_nce(**inputs | options, image_ids=x, text_ids=x.flip(0), backend="cpu")
            for x in (large, large.argsort().argsort())
        )
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert bool(torch.stack(found).any())


# The private operators, called by hand.


def _private(name: str, **change: Any) -> Any:
    """A call that is right but for `change`."""
    x, numbers = torch.randn(20, 8), torch.arange(20)
    pair = {"image": x, "text": x, "logit_scale": torch.tensor(2.0)}
    ids = {"image_ids": numbers, "text_ids": numbers}
    more = {
        "hard_text_ids": numbers[:3],
        "ignore": False,
        "label_smoothing": 0.1,
        "image_weight": 0.5,
        "reduction": "mean",
        "stats": True,
    }
    grads = {"grad_loss": None, "grad_image_loss": torch.ones(20), "grad_text_loss": None}
    needs = {f"need_{x}": True for x in ("image", "text", "logit_scale", "hard_texts")}
    keeps = {f"keep_{x}": True for x in ("image", "text", "logit_scale", "logit_bias")}
    states = {"image_state": torch.ones(4, 20), "text_state": torch.ones(4, 20)}
    arguments: dict[str, Inputs] = {
        "info_nce": {**pair, **ids, "hard_texts": x[:3], **more},
        "info_nce_backward": {**pair, **ids, "hard_texts": x[:3], **states, **grads, **more, **needs},
        "sigmoid_contrastive": {**pair, "logit_bias": torch.tensor(0.0), **ids, **keeps},
        "retrieval_ranks": {"query": x, "gallery": x, "target": numbers},
    }
    return getattr(torch.ops.mmkernels, f"{name}_cpu")(**arguments[name] | change)


SHORT, X, META = torch.arange(19), torch.randn(20, 8), torch.device("meta")
BAD_PAIRS: dict[str, Inputs] = {
    "no image": {"image": X[:0]},
    "no text": {"text": X[:0], "text_ids": SHORT[:0]},
    "no channels": {"image": X[:, :0], "text": X[:, :0]},
    "1-D images": {"image": X[0]},
    "4-D images": {"image": X[None, None]},
    "3-D texts": {"text": X[None]},
    "other channels": {"text": X[:, :7]},
    "whole features": {"image": X.long(), "text": X.long()},
    "float64": {"image": X.double(), "text": X.double()},
    "other dtypes": {"text": X.half()},
    "two scales": {"logit_scale": torch.ones(2)},
    "meta images": {"image": X.to(META)},
    "meta texts": {"text": X.to(META)},
    "meta ids": {"image_ids": SHORT.to(META)},
    "short image ids": {"image_ids": SHORT},
    "short text ids": {"text_ids": SHORT},
    "ids of two dims": {"text_ids": torch.zeros(20, 1).long()},
    "ids of half the bits": {"text_ids": torch.zeros(20).int()},
    "floating ids": {"image_ids": torch.zeros(20)},
    "one side's ids": {"text_ids": None},
    "more texts without ids": {"text": torch.randn(30, 8), "image_ids": None, "text_ids": None},
}
BAD_HARD: dict[str, Inputs] = {
    "1-D hard texts": {"hard_texts": X[0]},
    "hard texts of other channels": {"hard_texts": X[:, :7]},
    "hard texts of another dtype": {"hard_texts": X.bfloat16()},
    "meta hard texts": {"hard_texts": X.to(META)},
    "meta hard ids": {"hard_text_ids": SHORT[:3].to(META)},
    "short hard ids": {"hard_text_ids": SHORT[:2]},
    "hard ids of half the bits": {"hard_text_ids": SHORT[:3].int()},
    "hard ids without hard texts": {"hard_texts": None},
    "hard ids alone": {"image_ids": None, "text_ids": None},
    "other numbers that are ignored": {"ignore": True, "text": torch.randn(300, 8), "text_ids": torch.arange(300)},
}
BAD: dict[str, dict[str, Inputs]] = {
    "info_nce": BAD_PAIRS | BAD_HARD,
    "info_nce_backward": {
        **BAD_PAIRS,
        **BAD_HARD,
        "short state": {"image_state": torch.ones(4, 19)},
        "state of three rows": {"text_state": torch.ones(3, 20)},
        "meta state": {"text_state": torch.ones(4, 20, device=META)},
        "short gradient": {"grad_image_loss": torch.ones(19)},
        "meta gradient": {"grad_text_loss": torch.ones(20, device=META)},
    },
    "sigmoid_contrastive": BAD_PAIRS | {"two biases": {"logit_bias": torch.ones(2)}},
    "retrieval_ranks": {
        "several queries": {"query": torch.randn(20, 2, 8)},
        "1-D queries": {"query": X[:, 0]},
        "an empty gallery": {"gallery": X[:0]},
        "other channels": {"gallery": X[:, :7]},
        "whole features": {"query": X.long(), "gallery": X.long()},
        "other dtypes": {"gallery": X.bfloat16()},
        "short targets": {"target": SHORT},
        "targets of half the bits": {"target": torch.zeros(20).int()},
        "a target too large": {"target": torch.full((20,), 20)},
        "a target below 0": {"target": torch.full((20,), -1)},
        "a target beyond int32": {"target": torch.full((20,), 2**32)},
        "meta gallery": {"gallery": X.to(META)},
    },
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, table in BAD.items() for name in table])
def test_the_operators_read_past_no_end(op: str, name: str) -> None:
    assert _private(op) is not None
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        _private(op, **BAD[op][name])
