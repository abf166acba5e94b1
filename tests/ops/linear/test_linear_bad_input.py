"""What the linear ops refuse, by the name of the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmkernels

GOOD: dict[str, Any] = {
    "hidden": torch.zeros(2, 3, 8),
    "weight": torch.zeros(10, 8),
    "target": torch.tensor([[0, 9, -100], [1, 2, 3]]),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": 1.0}, TypeError, "hidden must be a tensor, got float"),
    ({"hidden": torch.zeros(2, 3, 8, dtype=torch.int32)}, TypeError, "hidden must be float16, bfloat16, float32 or"),
    ({"hidden": torch.zeros(2, 3, 0)}, ValueError, r"hidden must be \[..., d\] with at least one channel"),
    ({"hidden": torch.zeros(())}, ValueError, r"hidden must be \[..., d\] with at least one channel, got shape \(\)"),
    ({"weight": torch.zeros(10, 7)}, ValueError, r"weight must be \[V, 8\].*got shape \(10, 7\)"),
    ({"weight": torch.zeros(0, 8)}, ValueError, r"weight must be \[V, 8\].*got shape \(0, 8\)"),
    ({"weight": torch.zeros(8)}, ValueError, r"weight must be \[V, 8\].*got shape \(8,\)"),
    (
        {"weight": torch.zeros(10, 8).half()},
        TypeError,
        "weight must have hidden's dtype torch.float32, got torch.float16",
    ),
    ({"weight": torch.zeros(10, 8, device="meta")}, ValueError, "weight must be on hidden's device cpu, got meta"),
    ({"bias": torch.zeros(9)}, ValueError, r"bias must be \[10\], got shape \(9,\)"),
    ({"bias": torch.zeros(10).double()}, TypeError, "bias must have hidden's dtype torch.float32, got torch.float64"),
    ({"target": [0, 1]}, TypeError, "target must be a tensor, got list"),
    ({"target": torch.zeros(2, 3)}, TypeError, "target must be int64, got torch.float32"),
    ({"target": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "target must be int64, got torch.int32"),
    ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, r"target must be \[2, 3\], a token for each row"),
    (
        {"target": torch.tensor([[0, 1, 2], [3, 10, 11]])},
        ValueError,
        r"target\[1, 1\] must be a token, from 0 to 9, ",
    ),
    ({"target": torch.tensor([[0, 1, 2], [3, 4, -1]])}, ValueError, r"target\[1, 2\] must be .*-100, got -1"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index must be an int that int64 holds, got 9223372036854775808"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
    ({"softcap": float("nan")}, ValueError, "softcap must be a positive number or None, got nan"),
    ({"softcap": "30"}, TypeError, "softcap must be a positive number or None, got str"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
    ({"group": 3}, TypeError, "group must be a torch.distributed.ProcessGroup"),
]
OF_LOGPROBS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature must be a positive number, got -1.0"),
    ({"temperature": float("inf")}, ValueError, "temperature must be a positive number, got inf"),
    ({"return_entropy": "no"}, TypeError, "return_entropy must be a bool, got str"),
    ({"return_correct": 1}, TypeError, "return_correct must be a bool, got int"),
]
OF_LOSS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "average"}, ValueError, 'reduction must be "mean", "sum" or "none", got \'average\''),
    ({"reduction": None}, ValueError, "reduction must be .*, got None"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number from 0 to 1, got 1.5"),
    ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be a number from 0 to 1, got nan"),
    ({"z_loss": -1e-4}, ValueError, "z_loss must be a number, at least 0, got -0.0001"),
    ({"weight": torch.ones(9)}, ValueError, r"weight must be \[10\], one for each token, got \(9,\)"),
    ({"weight": torch.ones(10, dtype=torch.int64)}, TypeError, "weight must be float16, bfloat16, float32 or float64"),
    (
        {"target": torch.zeros(2, 3, 9)},
        ValueError,
        r"target must be int64 \[2, 3\], or probabilities \[2, 3, 10\]",
    ),
    ({"target": torch.zeros(2, 3, 10, requires_grad=True)}, ValueError, "target must not require a gradient"),
]
NAMES = {"hidden": "input", "weight": "linear_weight", "bias": "linear_bias"}


def _ids(row: Any) -> str | None:
    return " ".join(row) if isinstance(row, dict) else None


@pytest.mark.parametrize(("change", "error", "message"), BAD + OF_LOGPROBS, ids=_ids)
def test_linear_logprobs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        mmkernels.linear_logprobs(**GOOD | change)


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=_ids)
def test_linear_cross_entropy(change: dict[str, Any], error: type[Exception], message: str) -> None:
    if message.startswith("target must be int64, got torch.float32"):
        error, message = ValueError, r"target must be int64 \[2, 3\], or probabilities"
    for name, other in NAMES.items():
        message = message.replace(f"{name} must", f"{other} must").replace("hidden's", "input's")
    given = {NAMES.get(name, name): x for name, x in (GOOD | change).items()}
    with pytest.raises(error, match=f"^{message}"):
        mmkernels.linear_cross_entropy(**given)


@pytest.mark.parametrize(("change", "error", "message"), OF_LOSS, ids=_ids)
def test_options_of_the_loss(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {NAMES.get(name, name): x for name, x in GOOD.items()} | change
    with pytest.raises(error, match=f"^{message}"):
        mmkernels.linear_cross_entropy(**given)


def test_a_target_that_is_no_token_in_a_graph() -> None:
    """Where it can't be looked at, it is defined: NaN, and no gradient."""
    hidden, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    step = torch.compile(mmkernels.linear_logprobs, fullgraph=True, backend="aot_eager")
    found = step(hidden, weight, torch.tensor([0, 5, -7]))
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    assert found.isnan().tolist() == [False, True, True]
    assert (grad != 0).any(1).tolist() == [True, False, False]
