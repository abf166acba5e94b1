"""The block ops' kernels beyond the specs' cases: cuts on every instruction set, small tiles, what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, check, generator, name_of
from ops.contrastive.block_tools import Cuts, info_nce_by_blocks, ranks_by_blocks, sigmoid_by_blocks
from ops.contrastive.cpu_tools import WAYS, Problem, case_of, check_kernel, check_scale_s_gradient, each_way, of_sigmoid
from ops.contrastive.tools import features
from ops.cpu_tools import needs_kernels
from pairwise import parametrize

from mmkernels.ops.contrastive.info_nce import block as softmax
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu
from mmkernels.spec import Inputs


def _problem(
    n: int, m: int, dim: int, *, queries: int = 0, ids: int = 0, scale: float = 8.0, twins: float = 0.0, **options: Any
) -> Problem:
    """As in test_contrastive_cpu.py; `twins`: how far every second feature lies from the one before it, 0: anywhere."""

    def problem(number: int) -> Inputs:
        g = generator(number)
        inputs = features(n, m, dim, queries, scale, seed=number)
        for side in ("image", "text") if twins else ():
            other = torch.randn(inputs[side][1::2].shape, generator=g, dtype=torch.float64)
            inputs[side][1::2] = F.normalize(inputs[side][::2] + twins * other, dim=1)
        if ids:
            sides = (("image", n), ("text", m))
            inputs |= {f"{side}_ids": torch.randint(ids, (k,), generator=g) for side, k in sides}
        return inputs | {"reduction": "none"} | options

    return problem


_IGNORE: Inputs = {"same_id": "ignore", "label_smoothing": 0.1}
PROBLEMS: dict[str, tuple[Problem, tuple[Cuts, Cuts]]] = {
    "pairs, ragged": (_problem(300, 300, 40), ((1, 70, 200), (16, 17, 150, 299))),
    "pairs, smoothed": (_problem(150, 150, 17, label_smoothing=0.2), ((64,), (3, 67, 131))),
    "captions": (_problem(150, 290, 33, ids=90), ((2, 66), (1, 130))),
    "ignored": (_problem(140, 140, 33, ids=30, **_IGNORE), ((5, 69), (64, 72, 130))),
    "queries": (_problem(70, 70, 19, queries=3), ((9,), (33,))),
    "deep": (_problem(40, 40, 2103, scale=20.0), ((3, 11), (2, 20))),
    "few texts, exchanged": (_problem(300, 300, 24), ((), (3, 7, 280))),
    "few texts of a deep dim, exchanged": (_problem(80, 80, 1101, ids=20, **_IGNORE), ((), (5,))),
    # Twins contend for each softmax: else it is all or nothing, and the few rows that are not decide by luck.
    "far apart": (_problem(130, 130, 16, scale=-1e4, twins=1e-4), ((60,), (50,))),
}


@needs_kernels
@parametrize(
    "isa, dtype, name",
    [(*way, name) for way in WAYS for name in PROBLEMS],
    lambda row: {"way": row[:2], "problem": row[2]},
    ids=lambda row: f"{row[0]}-{name_of(row[1])}-{row[2]}".replace(" ", "_"),
)
def test_cuts(isa: str, dtype: torch.dtype, name: str) -> None:
    problem, cuts = PROBLEMS[name]
    with cpu.use_isa(isa):
        check_kernel(case_of(name, problem), dtype, threads=2, function=info_nce_by_blocks(cuts))


@needs_kernels
@each_way
@pytest.mark.parametrize("name", ["pairs, ragged", "captions", "few texts, exchanged"])
def test_cuts_of_the_sigmoid_loss(isa: str, dtype: torch.dtype, name: str) -> None:
    problem, cuts = PROBLEMS[name]
    with cpu.use_isa(isa):
        check_kernel(
            case_of(name, of_sigmoid(problem)), dtype, op="sigmoid_contrastive", function=sigmoid_by_blocks(cuts)
        )


@needs_kernels
@each_way
@pytest.mark.parametrize("dim", [5, 40, 150, 1301])
def test_a_score_does_not_depend_on_how_many_there_are(isa: str, dtype: torch.dtype, dim: int) -> None:
    """Of copies of one item, those before the right answer count, in pieces of any size and for few queries or many."""
    query, item = (x.to(dtype) for x in (features(40, dim=dim)["image"], features(1, dim=dim)["text"]))
    gallery, target = item.expand(300, dim), torch.arange(40) * 7 + 3
    with cpu.use_isa(isa):
        for queries in (1, 2, 9, 40):
            found = ranks_by_blocks(((), (1, 3, 11, 28, 100)))(
                query[:queries], gallery, target[:queries], backend="cpu"
            )
            assert torch.equal(found, target[:queries])


@needs_kernels
@each_way
@pytest.mark.parametrize("dim", [5, 40, 1301])
def test_a_best_positive_ties_with_its_copies(isa: str, dtype: torch.dtype, dim: int) -> None:
    """All texts are one: of each image those of a lower index stand before its own; and so for texts and images."""
    inputs = {name: x.to(dtype) for name, x in features(60, dim=dim).items()} | {"logit_scale": torch.tensor(3.0)}
    for name in ("image", "text"):
        alike = inputs | {name: inputs[name][:1].expand(60, dim).contiguous()}
        with cpu.use_isa(isa):
            _, stats = info_nce_by_blocks(((20, 22), (1, 3, 12, 13)))(**alike, return_stats=True, backend="cpu")
        mean_rank = stats[3 if name == "image" else 2]
        assert float(mean_rank) == pytest.approx(59 / 2)


@needs_kernels
@pytest.mark.parametrize("kind", ["somewhat alike", "sharp, in a cone"])
def test_the_scale_s_gradient_in_the_root_mean_square(kind: str) -> None:
    """Each block measures dots from the same middle, from which the sum over all blocks does not depend."""
    check_scale_s_gradient(kind, info_nce_by_blocks(((100,), (170,))))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_no_middle_changes_the_sum_over_all_blocks(backend: str) -> None:
    inputs = features(20, dim=8)
    image, text, scale = (inputs[name] for name in ("image", "text", "logit_scale"))
    block = (image, text, scale, None, None, 0, False)
    sums = softmax.BLOCK(softmax.BlockArguments(*block, False, None, None, None, None), backend)
    found = [
        softmax.BACKWARD(
            softmax.BackwardArguments(
                *block, False, 0.0, middle, sums[0][:4], sums[1][:4], torch.ones(20).double(), None, False, False, True
            ),
            backend,
        )
        for middle in (0.0, 0.5)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# What does not fit, called by hand.


def _private(name: str, **change: Any) -> Any:
    """A call that is right but for `change`."""
    x, numbers = torch.randn(20, 8), torch.arange(20)
    pair = {"image": x, "text": x, "logit_scale": torch.tensor(2.0)}
    ids = {"image_ids": numbers, "text_ids": numbers, "first_text": 0}
    best = {f"{side}_{of}": torch.zeros(20).to(t) for side in ("image", "text") for of, t in _BEST.items()}
    states = {"image_state": torch.ones(4, 20), "text_state": torch.ones(4, 20)}
    grads = {"grad_image_loss": torch.ones(20), "grad_text_loss": None}
    needs = {f"need_{x}": True for x in ("image", "text", "logit_scale")}
    keeps = {f"keep_{x}": True for x in ("image", "text", "logit_scale", "logit_bias")}
    arguments: dict[str, Inputs] = {
        "info_nce_best": {**pair, **ids, "ignore": True},
        "info_nce_block": {**pair, **ids, "ignore": True, "smooth": True, **best},
        "info_nce_block_backward": {
            **pair, **ids, "ignore": True, "ranked": False, "label_smoothing": 0.1, "middle": 0.0,
            **states, **grads, **needs,
        },
        "sigmoid_contrastive_block": {**pair, "logit_bias": torch.tensor(0.0), **ids, "divisor": 2.0, **keeps},
        "retrieval_ranks_block": {"query": x, "gallery": x[:5], "right": x, "right_index": numbers},
    }  # fmt: skip
    return getattr(torch.ops.mmkernels, f"{name}_cpu")(**arguments[name] | change)


_BEST = {"best": torch.float32, "index": torch.int64}
X = torch.randn(20, 8)
PAIRS: dict[str, Inputs] = {
    "no image": {"image": X[:0]},
    "no text": {"text": X[:0]},
    "other channels": {"text": X[:, :7]},
    "float64": {"image": X.double(), "text": X.double()},
    "other dtypes": {"text": X.half()},
    "short image ids": {"image_ids": torch.arange(19)},
    "one side's ids": {"text_ids": None},
    "two scales": {"logit_scale": torch.ones(2)},
}
BAD: dict[str, dict[str, Inputs]] = {
    "info_nce_best": PAIRS,
    "info_nce_block": {
        **PAIRS,
        "short scores": {"image_best": torch.zeros(19)},
        "scores without indices": {"image_index": None},
        "one side's best": {"text_best": None, "text_index": None},
        "indices of two dims": {"text_index": torch.zeros(20, 1).long()},
        "meta scores": {"text_best": torch.zeros(20, device="meta")},
    },
    "info_nce_block_backward": {
        **PAIRS,
        "short state": {"image_state": torch.ones(4, 19)},
        "sums in place of a state": {"text_state": torch.ones(6, 20)},
        "short gradient": {"grad_image_loss": torch.ones(19)},
    },
    "sigmoid_contrastive_block": PAIRS | {"two biases": {"logit_bias": torch.ones(2)}},
    "retrieval_ranks_block": {
        "several queries": {"query": torch.randn(20, 2, 8)},
        "an empty piece": {"gallery": X[:0]},
        "few right answers": {"right": X[:19]},
        "right answers of another dtype": {"right": X.half()},
        "right answers of other channels": {"right": X[:, :7]},
        "few places": {"right_index": torch.arange(19)},
        "places of half the bits": {"right_index": torch.zeros(20).int()},
    },
}


@needs_kernels
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, table in BAD.items() for name in table])
def test_the_operators_read_past_no_end(op: str, name: str) -> None:
    assert _private(op) is not None
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        _private(op, **BAD[op][name])


# Triton.

TILED: dict[str, tuple[Problem, tuple[Cuts, Cuts]]] = {
    "pairs": (_problem(50, 50, 12), ((7,), (20,))),
    "ignored": (_problem(40, 40, 12, ids=9, **_IGNORE), ((3,), (17,))),
    "captions": (_problem(40, 50, 12, ids=12), ((9,), (17,))),
}


@pytest.mark.interpreted
@pytest.mark.skipif(not gpu.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", TILED)
def test_small_tiles_groups_and_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a block's diagonal crosses at any place, and a group of rows for each of them."""
    from triton_tiling import tiled

    from mmkernels.ops.contrastive.triton import call

    for budget in ("PARTIAL_BYTES", "STRIP_BYTES"):
        monkeypatch.setattr(call, budget, 1)
    problem, cuts = TILED[name]
    with tiled(16, 32):
        case = case_of(name, problem)
        check(SPECS["info_nce"], case, torch.float32, "triton", function=info_nce_by_blocks(cuts))
