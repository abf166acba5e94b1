"""`LinearCrossEntropyLoss` against its formula, and against the signature and results of Liger's loss."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels
from mmkernels.nn import CrossEntropyOutput, LinearCrossEntropyLoss

VOCAB, DIM, ROWS = 19, 6, 12
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, HIDDEN, BIAS, CE_WEIGHT = (
    torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    for shape in ((VOCAB, DIM), (ROWS, DIM), (VOCAB,), (VOCAB,))
)
CE_WEIGHT = CE_WEIGHT.abs() + 0.1
TARGET = torch.randint(VOCAB, (ROWS,), generator=GENERATOR)
TARGET[[2, 7, 8]] = -100


def formula(weight: Tensor, hidden: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> CrossEntropyOutput:
    """Row by row, with logits."""
    ce_weight, e = options.get("ce_weight"), options.get("label_smoothing", 0.0)
    reduction, scale = options.get("reduction", "mean"), options.get("lse_square_scale", 0.0)
    w = torch.ones(VOCAB, dtype=weight.dtype) if ce_weight is None else ce_weight
    losses, z_losses, right, predicted = [], [], [], []
    live = [int(y) for y in target if y != -100]
    by = sum(float(w[y]) for y in live) if reduction == "mean" else 1.0
    z_by = len(live) if reduction == "mean" else 1.0
    for x, y in zip(hidden, target, strict=True):
        if y == -100:
            losses.append(0 * x.sum())
            z_losses.append(0 * x.sum())
            right.append(0.0)
            predicted.append(-1)
            continue
        z = weight @ x if bias is None else weight @ x + bias
        if options.get("softcap"):
            z = options["softcap"] * torch.tanh(z / options["softcap"])
        logp = z - z.exp().sum().log()
        chance = logp[y].exp().detach() if options.get("use_token_scaling") else 1.0
        z_losses.append(chance * scale * z.exp().sum().log() ** 2 / z_by)
        loss = (1 - e) * w[y] * -logp[y] + e / VOCAB * -(w * logp).sum()
        losses.append(chance * loss / by + z_losses[-1])
        predicted.append(int(z.argmax()))
        right.append(float(predicted[-1] == y))
    loss, z_loss, accuracy = torch.stack(losses), torch.stack(z_losses), torch.tensor(right)
    if reduction != "none":
        loss, z_loss, accuracy = loss.sum(), z_loss.sum(), accuracy.sum() / len(live)
    return CrossEntropyOutput(loss, z_loss.detach(), accuracy, torch.tensor(predicted))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"ce_weight": CE_WEIGHT, "label_smoothing": 0.1},
    {"lse_square_scale": 0.01, "softcap": 3.0},
    {"lse_square_scale": 0.01, "ce_weight": CE_WEIGHT, "label_smoothing": 0.2, "softcap": 2.0},
    {"use_token_scaling": True},
    {"use_token_scaling": True, "lse_square_scale": 0.01, "ce_weight": CE_WEIGHT, "label_smoothing": 0.2},
    {"use_token_scaling": True, "lse_square_scale": 0.02, "softcap": 3.0},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_against_the_formula(options: dict[str, Any], reduction: str) -> None:
    module = LinearCrossEntropyLoss(
        **options, reduction=reduction, return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True
    )
    bias = None if "softcap" in options else BIAS
    results = []
    for function in (module, formula):
        leaves = [x.clone().requires_grad_() for x in (WEIGHT, HIDDEN) + (() if bias is None else (bias,))]
        more = {"target": TARGET} | (options | {"reduction": reduction} if function is formula else {})
        names = ("weight", "hidden") if function is formula else ("lin_weight", "_input")
        out = function(**dict(zip(names, leaves)), bias=leaves[2] if bias is not None else None, **more)
        flow = torch.linspace(1.0, 2.0, out.loss.numel(), dtype=torch.float64).reshape(out.loss.shape)
        results.append((out, torch.autograd.grad(out.loss, leaves, flow)))
    (ours, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(ours.z_loss, expected.z_loss, rtol=1e-10, atol=1e-13)
    assert not ours.z_loss.requires_grad
    assert torch.equal(ours.token_accuracy, expected.token_accuracy)
    assert torch.equal(ours.predicted_tokens, expected.predicted_tokens)


def test_only_what_is_asked_for_is_returned() -> None:
    assert isinstance(LinearCrossEntropyLoss()(WEIGHT, HIDDEN, TARGET, BIAS), Tensor)
    names = ("z_loss", "token_accuracy", "predicted_tokens")
    for name in names:
        out = LinearCrossEntropyLoss(**{f"return_{name}": True})(WEIGHT, HIDDEN, TARGET)
        assert isinstance(out, CrossEntropyOutput)
        assert [other for other in names if getattr(out, other) is not None] == [name]


def test_rows_of_any_shape() -> None:
    module = LinearCrossEntropyLoss(reduction="none", return_predicted_tokens=True, use_token_scaling=True)
    flat = module(WEIGHT, HIDDEN, TARGET)
    folded = module(WEIGHT, HIDDEN.view(3, 4, DIM), TARGET.view(3, 4))
    assert torch.equal(folded.loss.flatten(), flat.loss) and folded.predicted_tokens.shape == (3, 4)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_row_counts(options: dict[str, Any]) -> None:
    """Liger's mean is 0 then, where PyTorch's is NaN."""
    hidden = HIDDEN.clone().requires_grad_()
    module = LinearCrossEntropyLoss(**options, return_z_loss=True, return_token_accuracy=True)
    out = module(WEIGHT, hidden, torch.full_like(TARGET, -100))
    assert out.loss.item() == out.z_loss.item() == 0.0 and out.token_accuracy.isnan()
    assert not torch.autograd.grad(out.loss, hidden)[0].any()


def test_16_bit_inputs_and_a_moved_class_weight() -> None:
    module = LinearCrossEntropyLoss(CE_WEIGHT.float(), accum_dtype=torch.float32).to("cpu")
    assert list(module.state_dict()) == [] and "ce_weight" in dict(module.named_buffers())
    low = [x.bfloat16() for x in (WEIGHT, HIDDEN)]
    loss = module(*low, TARGET)
    expected = formula(*(x.double() for x in low), None, TARGET, ce_weight=CE_WEIGHT).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)


def test_it_is_the_public_op_and_learns() -> None:
    head = torch.nn.Linear(DIM, VOCAB).double()
    loss = LinearCrossEntropyLoss()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    first = None
    for _ in range(10):
        optimizer.zero_grad()
        value = loss(head.weight, HIDDEN, TARGET, head.bias)
        first = value.item() if first is None else first
        value.backward()
        optimizer.step()
    assert value.item() < 0.8 * first
    public = mmkernels.linear_cross_entropy(HIDDEN, head.weight, TARGET, linear_bias=head.bias)
    assert torch.equal(public, loss(head.weight, HIDDEN, TARGET, head.bias))


def test_signatures_are_ligers() -> None:
    """As of liger-kernel 0.8.5."""

    def of(function: Any) -> list[tuple[str, Any]]:
        return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]

    assert of(LinearCrossEntropyLoss) == [
        ("ce_weight", None),
        ("ignore_index", -100),
        ("lse_square_scale", 0.0),
        ("label_smoothing", 0.0),
        ("reduction", "mean"),
        ("softcap", None),
        ("return_z_loss", False),
        ("accum_dtype", None),
        ("use_token_scaling", False),
        ("return_token_accuracy", False),
        ("return_predicted_tokens", False),
    ]
    empty = inspect.Parameter.empty
    assert of(LinearCrossEntropyLoss.forward)[1:] == [
        ("lin_weight", empty),
        ("_input", empty),
        ("target", empty),
        ("bias", None),
    ]
    for name, _ in of(LinearCrossEntropyLoss):
        assert hasattr(LinearCrossEntropyLoss(), name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ce_weight": torch.ones(VOCAB).long()}, TypeError, "ce_weight must be float16"),
        ({"ce_weight": [1.0] * VOCAB}, TypeError, "ce_weight must be a tensor, got list"),
        ({"lse_square_scale": -1e-4}, ValueError, r"lse_square_scale must be a finite number >= 0, got -0\.0001"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number from 0 to 1, got 1\.5"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none, got 'batchmean'"),
        ({"softcap": 0.0}, ValueError, r"softcap must be None or a finite number above 0, got 0\.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be None or a finite number above 0, got inf"),
        ({"accum_dtype": torch.bfloat16}, ValueError, r"accum_dtype must be None or torch\.float32, in which grad"),
        ({"return_z_loss": "no"}, TypeError, "return_z_loss must be a bool, got str"),
        ({"use_token_scaling": 1}, TypeError, "use_token_scaling must be a bool, got int"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lin_weight": WEIGHT.float()}, TypeError, "linear_weight must"),
        ({"_input": HIDDEN[:, 1:]}, ValueError, "linear_weight must|input must"),
        ({"target": TARGET[1:]}, ValueError, "target must"),
        (
            {"target": TARGET.clamp(0).index_fill(0, torch.tensor([3]), VOCAB)},
            ValueError,
            r"target\[3\] must be a token",
        ),
        ({"bias": BIAS[1:]}, ValueError, "linear_bias must"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss()(**{"lin_weight": WEIGHT, "_input": HIDDEN, "target": TARGET} | change)


def test_a_class_weight_for_each_token() -> None:
    with pytest.raises(ValueError, match="weight must be"):
        LinearCrossEntropyLoss(CE_WEIGHT[1:])(WEIGHT, HIDDEN, TARGET)
