"""Contrastive losses of aligned pairs, of scales and features of any size, of NaN and inf."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, backends, each_backend
from ops.contrastive.tools import by_loops, features, open_clip, open_clip_sigmoid
from pairwise import parametrize
from torch import Tensor

from mmkernels import info_nce, sigmoid_contrastive
from mmkernels.runtime import triton as gpu
from mmkernels.spec import Inputs, cast

NAN, INF = math.nan, math.inf
PAIRS = 16 if gpu.INTERPRETED else 64
each_bad = pytest.mark.parametrize("bad", [NAN, INF, -INF])


def _float32(inputs: Inputs) -> Inputs:
    """Where what is extreme is felt first; every backend computes in it."""
    return cast(inputs, torch.float32)


def _step(function: Any, inputs: Inputs, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    loss = function(**leaves, **options)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


# Scales and sizes.


@each_backend("info_nce")
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.03])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aligned_pairs_at_scale_100(backend: str, noise: float, smoothing: float) -> None:
    """As at the end of a training: probabilities of 1, and losses near 0 to an absolute 1e-6."""
    inputs = _float32(features(PAIRS, dim=32, scale=100.0))
    inputs["image"] = F.normalize(inputs["text"] + noise * features(PAIRS, dim=32, seed=1)["image"].float(), dim=1)
    loss, grads = _step(info_nce, inputs, label_smoothing=smoothing, backend=backend)
    rows = by_loops(**cast(inputs, torch.float64), label_smoothing=smoothing)
    want = (rows[0].mean + rows[1].mean) / 2
    assert abs(float(loss) - float(want)) <= (1e-6 if smoothing == 0 else 1e-6 * float(want))
    assert all(bool(g.isfinite().all()) for g in grads.values())
    one_by_one = info_nce(**inputs, label_smoothing=smoothing, reduction="none", backend=backend)
    assert min(float(x.min()) for x in one_by_one) >= 0.0  # a cross-entropy, whatever is rounded


@each_backend("info_nce")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0, -30.0])
def test_a_pair_alone_has_no_loss_and_no_gradient(backend: str, scale: float, smoothing: float) -> None:
    for seed in range(1 if gpu.INTERPRETED else 5):
        inputs = _float32(features(1, dim=48, scale=scale, seed=seed))
        loss, grads = _step(info_nce, inputs, label_smoothing=smoothing, backend=backend)
        assert float(loss) == 0.0
        assert all(not bool(g.any()) for g in grads.values())


@each_backend("info_nce")
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30, -1e30, 0.0, -0.0, 1e-30, -1e-50])
def test_any_scale(backend: str, scale: float) -> None:
    """Rounding in a product of d channels moves a logit by no more than d * eps * scale."""
    inputs = _float32(features(PAIRS, dim=8, scale=scale))
    loss, grads = _step(info_nce, inputs, backend=backend)
    want, truth = _step(open_clip, cast(inputs, torch.float64))
    rounding = 8 * torch.finfo(torch.float32).eps
    assert abs(float(loss) - float(want)) <= 2 * rounding * max(abs(scale), float(want))
    for name, true in truth.items():
        assert bool(grads[name].isfinite().all())
        # Beyond 1e4 each softmax is all or nothing, and the gradient one difference of features, times the scale.
        unit = abs(scale) if name != "logit_scale" and scale else 1.0
        torch.testing.assert_close(grads[name].double() / unit, true / unit, rtol=1e-4, atol=1e-5)


@each_backend("info_nce")
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_equal_features_are_a_guess(backend: str, value: float) -> None:
    """Every row's loss is log N, whatever the scale."""
    ones = torch.full((PAIRS, 8), value)
    inputs = {"image": ones, "text": ones, "logit_scale": torch.tensor(5.0)}
    loss, grads = _step(info_nce, inputs, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(math.log(PAIRS)))
    for x in grads.values():
        torch.testing.assert_close(x, torch.zeros_like(x))


@each_backend("info_nce")
def test_features_that_are_not_normalised(backend: str) -> None:
    """Of size 1,000, so that a scale of 100 makes logits of 1e8."""
    inputs = _float32(features(PAIRS, dim=8, scale=100.0))
    inputs |= {name: 1e3 * inputs[name] for name in ("image", "text")}
    loss, grads = _step(info_nce, inputs, backend=backend)
    want, truth = _step(open_clip, cast(inputs, torch.float64))
    assert abs(float(loss) - float(want)) <= 2 * 8 * torch.finfo(torch.float32).eps * 1e8
    for name, true in truth.items():
        unit = float(true.abs().max())
        torch.testing.assert_close(grads[name].double() / unit, true / unit, rtol=1e-4, atol=1e-5)


@each_backend("info_nce")
def test_a_hard_text_far_above_all_others(backend: str) -> None:
    """Its logit stands above the rest by 1e4 and more: the loss is that distance, and nothing overflows."""
    inputs = _float32(features(PAIRS, dim=8, scale=1e3))
    inputs["hard_texts"] = 20.0 * inputs["image"][:3]
    loss, grads = _step(info_nce, inputs, backend=backend)
    rows = by_loops(**cast(inputs, torch.float64))
    want = float((rows[0].mean + rows[1].mean) / 2)
    assert abs(float(loss) - want) <= 2 * 8 * torch.finfo(torch.float32).eps * 2e4
    assert all(bool(g.isfinite().all()) for g in grads.values())


@each_backend("sigmoid_contrastive")
@pytest.mark.parametrize(
    ("scale", "bias"),
    [(10.0, -10.0), (100.0, -10.0), (1.0, 1e4), (1.0, -1e4), (1e4, 0.0), (-1e4, 3.0), (0.0, 0.0), (1e30, -1e30)],
)
def test_any_scale_and_bias_of_the_sigmoid_loss(backend: str, scale: float, bias: float) -> None:
    """To a relative 1e-6, as a training begins with 10 and -10; where logits are large, they are what is rounded."""
    pairs = 48 if gpu.INTERPRETED else 512
    inputs = _float32(features(pairs, dim=16, scale=scale) | {"logit_bias": torch.tensor(bias)})
    loss, grads = _step(sigmoid_contrastive, inputs, backend=backend)
    want, truth = _step(open_clip_sigmoid, cast(inputs, torch.float64))
    assert abs(float(loss) - float(want)) <= 1e-6 * float(want)
    for name, true in truth.items():
        assert bool(grads[name].isfinite().all())
        unit = max(1.0, float(true.abs().max()))
        torch.testing.assert_close(grads[name].double() / unit, true / unit, rtol=1e-4, atol=1e-5)


# NaN and inf.


def _rows(backend: str, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Both directions' losses; the backward pass must end, whatever it gives."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    images, texts = info_nce(**leaves, **options, reduction="none", backend=backend)
    grads = torch.autograd.grad(images.sum() + texts.sum(), list(leaves.values()))
    assert [g.shape for g in grads] == [x.shape for x in leaves.values()]
    return images.detach(), texts.detach()


def _spoiled(name: str, bad: float, row: int = 2) -> Inputs:
    """Positive features, so that inf among them is inf in each score, with one that is `bad`."""
    inputs = _float32(features(6) | {"hard_texts": features(4, seed=1)["text"]})
    inputs = {name: x.abs() for name, x in inputs.items()}
    inputs[name][row, 1] = bad
    return inputs


@pytest.mark.interpreted
@parametrize(
    "backend, name, bad, weight",
    list(itertools.product(backends(SPECS["info_nce"]), ("image", "text"), (NAN, INF, -INF), (0.0, 0.5, 1.0))),
    ids=lambda row: "-".join(map(str, row)),
)
def test_the_loss_of_a_feature_that_is_no_number_is_nan(backend: str, name: str, bad: float, weight: float) -> None:
    loss, _ = _step(info_nce, _spoiled(name, bad), image_weight=weight, backend=backend)
    assert bool(loss.isnan())


@each_backend("info_nce")
def test_a_hard_text_of_minus_infinity_is_none(backend: str) -> None:
    """All its pairs have a probability of 0."""
    inputs = _spoiled("hard_texts", -INF, row=3)
    without = inputs | {"hard_texts": inputs["hard_texts"][:3]}
    images, texts = _rows(backend, inputs)
    torch.testing.assert_close((images, texts), _rows(backend, without))


@each_backend("info_nce")
@pytest.mark.parametrize("bad", [NAN, INF])
def test_which_rows_are_nan(backend: str, bad: float) -> None:
    """Those whose softmax has the bad pair in it, and no other."""
    images, texts = _rows(backend, _spoiled("image", bad))
    assert images.isnan().tolist() == [row == 2 for row in range(6)] and bool(texts.isnan().all())
    images, texts = _rows(backend, _spoiled("text", bad))
    assert texts.isnan().tolist() == [row == 2 for row in range(6)] and bool(images.isnan().all())
    images, texts = _rows(backend, _spoiled("hard_texts", bad))
    assert bool(images.isnan().all()) and bool(texts.isfinite().all())


@each_backend("info_nce")
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_bad_pair_that_is_left_out_or_has_no_positive_reaches_no_other_row(
    backend: str, bad: float, smoothing: float
) -> None:
    """Image 2 and text 4 share an id; and where no text is image 2's, its own row is nothing."""
    inputs = _spoiled("image", bad)
    del inputs["hard_texts"]
    numbers = torch.tensor([0, 1, 7, 3, 7, 5])
    options = {"image_ids": numbers, "text_ids": numbers, "same_id": "ignore", "label_smoothing": smoothing}
    images, texts = _rows(backend, inputs, **options)
    assert images.isnan().tolist() == [row == 2 for row in range(6)]
    assert texts.isnan().tolist() == [row != 4 for row in range(6)]
    options = {"image_ids": torch.tensor([0, 1, 99, 3, 4, 5]), "text_ids": torch.arange(6) % 2}
    images, texts = _rows(backend, inputs, **options, label_smoothing=smoothing)
    assert images[2] == 0 and images[:2].isfinite().all() and bool((images[3:] == 0).all())
    assert bool(texts.isnan().all())


@each_backend("info_nce")
@pytest.mark.parametrize("scale", [NAN, INF, -INF])
def test_a_scale_that_is_no_number_is_reported(backend: str, scale: float) -> None:
    """inf times a score that is not 0: some logit is inf, and a softmax with inf in it is NaN."""
    loss, _ = _step(info_nce, _float32(features(6, scale=scale)), backend=backend)
    assert bool(loss.isnan())


@each_backend("info_nce")
def test_a_score_that_overflows_is_reported(backend: str) -> None:
    inputs = _float32(features(6))
    inputs |= {name: 1e25 * inputs[name].abs() for name in ("image", "text")}
    loss, _ = _step(info_nce, inputs, backend=backend)
    assert bool(loss.isnan())


@each_backend("sigmoid_contrastive")
@each_bad
@pytest.mark.parametrize("name", ["image", "text", "logit_scale", "logit_bias"])
def test_the_sigmoid_loss_of_what_is_no_number_is_not_finite(backend: str, name: str, bad: float) -> None:
    """Nothing less: some pair's loss is NaN or inf, and the loss is a sum."""
    inputs = _float32(features(6) | {"logit_bias": torch.tensor(-3.0)})
    inputs = {name: x.abs() for name, x in inputs.items()}
    inputs[name].view(-1)[-1] = bad
    loss, grads = _step(sigmoid_contrastive, inputs, backend=backend)
    assert not bool(loss.isfinite()) and (bool(loss.isnan()) or bad != bad or loss == INF)
    assert [g.shape for g in grads.values()] == [x.shape for x in inputs.values()]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "backend", [name for name in backends(SPECS["info_nce"], torch.float16) if name != "reference"]
)
def test_16_bit_features_overflow_no_sum(backend: str) -> None:
    """float16 ends at 65,504, far below products of features of 200: the naive formula overflows, here nothing may."""
    inputs = {name: (200 * x).half() for name, x in features(PAIRS, dim=32, seed=3).items()}
    inputs["logit_scale"] = torch.tensor(2.0)
    loss, grads = _step(info_nce, inputs, backend=backend)
    want, truth = _step(open_clip, cast(inputs, torch.float64))
    assert abs(float(loss) - float(want)) <= 2 * 32 * torch.finfo(torch.float32).eps * 2 * 200**2
    for name in ("image", "text"):  # their sums are rounded once, to the inputs' dtype
        torch.testing.assert_close(grads[name].double(), truth[name], rtol=torch.finfo(torch.float16).eps, atol=0.1)


@each_backend("info_nce")
def test_an_image_with_one_bad_query_is_a_bad_image(backend: str) -> None:
    inputs = _float32(features(6, queries=3))
    inputs["image"][2, 1, 0] = NAN
    images, texts = _rows(backend, inputs)
    assert images.isnan().tolist() == [row == 2 for row in range(6)] and bool(texts.isnan().all())
