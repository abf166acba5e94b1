"""Bad input to the ops that merge tokens: each message names the argument, what it must be and what it got."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mmkernels

X, BATCHED, META = torch.zeros(9, 4), torch.zeros(2, 6, 4), torch.zeros(9, 4, device="meta")
GROUP = torch.arange(9).clamp(max=5)

GOOD: dict[str, dict[str, Any]] = {
    "match_tokens": {"metric": X, "lengths": (5, 4), "keep": (3, 3)},
    "merge_tokens": {"x": X, "lengths": (5, 4), "keep": (3, 3)},
    "unmerge_tokens": {"x": X[:6], "assignment": GROUP},
}

Bad = tuple[dict[str, Any], type[Exception], str]
"""What differs from a good call, what that raises, and what the message is."""

NUMBERS: dict[str, Bad] = {
    "keep more": ({"keep": (3, 5)}, ValueError, r"keep must be from 1 to 4 for image 1 of 4 tokens, got 5"),
    "keep 0": ({"keep": (0, 3)}, ValueError, r"keep must be from 1 to 5 for image 0 of 5 tokens, got 0"),
    "keep one number": ({"keep": 5}, ValueError, r"keep must be from 1 to 4 for image 1 of 4 tokens, got 5"),
    "keep the protected": (
        {"keep": 2, "protect": 2},
        ValueError,
        r"keep must be from 3 to 5 for image 0 of 5 tokens, got 2",
    ),
    "keep of less": ({"keep": (3,)}, ValueError, r"keep must be for 2 images, got 1 numbers"),
    "keep below 0": ({"keep": (3, -1)}, ValueError, r"keep must be 0 or more, got -1"),
    "keep a share of 0": ({"keep": 0.0}, ValueError, r"keep must be above 0 and at most 1 as a share.*got 0.0"),
    "keep a large share": ({"keep": 1.5}, ValueError, r"keep must be above 0 and at most 1 as a share.*got 1.5"),
    "keep NaN": ({"keep": math.nan}, ValueError, r"keep must be above 0 and at most 1 as a share.*got nan"),
    "keep None": ({"keep": None}, TypeError, r"keep must be integers.*got NoneType"),
    "keep True": ({"keep": True}, TypeError, r"keep must be a number of tokens.*got bool"),
    "keep floats": ({"keep": (0.5, 0.5)}, TypeError, r"keep must be integers.*got float"),
    "keep a float tensor": ({"keep": torch.ones(2)}, TypeError, r"keep must be integers.*got torch.float32"),
    "protect below 0": ({"protect": -1}, ValueError, r"protect must be 0 or more, got -1"),
    "protect a float": ({"protect": 1.0}, TypeError, r"protect must be an integer.*got float"),
    "protect True": ({"protect": True}, TypeError, r"protect must be an integer.*got bool"),
    "lengths of less": ({"lengths": (5, 3)}, ValueError, r"lengths must match .*'s 9 tokens, got 8 in 2 images"),
    "lengths below 0": ({"lengths": (10, -1)}, ValueError, r"lengths must be 0 or more, got -1"),
    "lengths floats": ({"lengths": (5.0, 4.0)}, TypeError, r"lengths must be integers.*got float"),
    "backend": ({"backend": "gpu"}, ValueError, r"backend must be one of .*, or None; got 'gpu'"),
    "sizes a list": ({"sizes": [1.0] * 9}, TypeError, r"sizes must be a tensor, got list"),
    "sizes double": ({"sizes": torch.ones(9).double()}, TypeError, r"sizes must be torch.float32 .*got torch.float64"),
    "sizes integers": ({"sizes": torch.ones(9).long()}, TypeError, r"sizes must be torch.float32 .*got torch.int64"),
    "few sizes": ({"sizes": torch.ones(8)}, ValueError, r"sizes must be \[9\], one for each token, got shape \(8,\)"),
    "sizes of 0": ({"sizes": torch.arange(9.0)}, ValueError, r"sizes must be above 0, got 0.0"),
    "sizes NaN": ({"sizes": torch.full((9,), math.nan)}, ValueError, r"sizes must be above 0, got nan"),
    "sizes' device": ({"sizes": META[:, 0]}, ValueError, r"sizes must be on .*'s device cpu, got meta"),
}

METRIC: dict[str, Bad] = {
    "metric a list": ({"metric": [1.0]}, TypeError, r"metric must be a tensor, got list"),
    "metric integers": ({"metric": X.long()}, TypeError, r"metric must be float16.*got torch.int64"),
}

MERGE: dict[str, Bad] = {
    "x a list": ({"x": [1.0]}, TypeError, r"x must be a tensor, got list"),
    "x 1-D": ({"x": X[:, 0]}, ValueError, r"x must be \[tokens, C\] or \[images, tokens, C\], got shape \(9,\)"),
    "metric of less": (
        {"metric": X[:8]},
        ValueError,
        r"metric must be \[9, D\], a row for each token, got shape \(8, 4\)",
    ),
    "metric batched": (
        {"metric": X[None]},
        ValueError,
        r"metric must be \[9, D\], a row for each token, got shape \(1, 9, 4\)",
    ),
    "metric's device": ({"metric": META}, ValueError, r"metric must be on x's device cpu, got meta"),
    "keep two numbers of images of one size": (
        {"x": BATCHED, "lengths": 6, "keep": (3, 4)},
        ValueError,
        r"keep must be the same for all images of \[images, tokens, C\], got 3 and 4",
    ),
    "assignment a list": ({"assignment": [0]}, TypeError, r"assignment must be a tensor, got list"),
    "assignment int32": ({"assignment": GROUP.int()}, TypeError, r"assignment must be int64, got torch.int32"),
    "assignment of less": ({"assignment": GROUP[:8]}, ValueError, r"assignment must be \[9\], got shape \(8,\)"),
    "assignment too far": ({"assignment": GROUP + 1}, ValueError, r"assignment must be from 0 to 5, got 1 to 6"),
    "assignment below 0": ({"assignment": GROUP - 1}, ValueError, r"assignment must be from 0 to 5, got -1 to 4"),
    "assignment's hole": (
        {"assignment": GROUP.clamp(min=1)},
        ValueError,
        r"assignment must have a token for each of 6 rows, got none for 0",
    ),
    "assignment into another image": (
        {"assignment": GROUP},
        ValueError,
        r"assignment must give each token a row of its image, got row 3 for token 3 of image 0",
    ),
    "assignment's device": (
        {"assignment": GROUP.to("meta")},
        ValueError,
        r"assignment must be on x's device cpu, got meta",
    ),
}

UNMERGE: dict[str, Bad] = {
    "x integers": ({"x": X.long()}, TypeError, r"x must be float16.*got torch.int64"),
    "x 1-D": ({"x": X[:, 0]}, ValueError, r"x must be \[tokens, C\] or \[images, tokens, C\], got shape \(9,\)"),
    "assignment a list": ({"assignment": [0]}, TypeError, r"assignment must be a tensor, got list"),
    "assignment int32": ({"assignment": GROUP.int()}, TypeError, r"assignment must be int64, got torch.int32"),
    "assignment 2-D": ({"assignment": GROUP[None]}, ValueError, r"assignment must be \[tokens\] beside x, got shape"),
    "other images": (
        {"x": BATCHED, "assignment": torch.zeros(3, 6).long()},
        ValueError,
        r"assignment must be \[2, tokens\] beside x, got shape \(3, 6\)",
    ),
    "assignment too far": ({"assignment": GROUP + 1}, ValueError, r"assignment must be from 0 to 5, got 6"),
    "backend": ({"backend": "gpu"}, ValueError, r"backend must be one of .*, or None; got 'gpu'"),
}

ROWS = [
    (op, id, bad)
    for op, cases in {
        "match_tokens": NUMBERS | METRIC,
        "merge_tokens": NUMBERS | METRIC | MERGE,
        "unmerge_tokens": UNMERGE,
    }.items()
    for id, bad in cases.items()
]


@pytest.mark.parametrize("op", GOOD)
def test_good_input(op: str) -> None:
    getattr(mmkernels, op)(**GOOD[op])


@pytest.mark.parametrize(("op", "bad"), [(op, bad) for op, _, bad in ROWS], ids=[f"{op}-{id}" for op, id, _ in ROWS])
def test_bad_input(op: str, bad: Bad) -> None:
    change, error, message = bad
    with pytest.raises(error, match=f"^{message}"):
        getattr(mmkernels, op)(**GOOD[op] | change)


@pytest.mark.parametrize(("lengths", "keep"), [((10_000,), 9_999), ((7,) * 200, 4), ((1,) * 200, 1)])
def test_many_tokens_and_many_images(lengths: tuple[int, ...], keep: int) -> None:
    x = torch.randn(sum(lengths), 3)
    merged, left, sizes, assignment = mmkernels.merge_tokens(x, lengths, keep)
    assert left == (keep,) * len(lengths) and len(merged) == sum(left) == int(assignment.max()) + 1
    assert float(sizes.sum()) == len(x)
