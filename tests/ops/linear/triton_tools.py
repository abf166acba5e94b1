"""What the tests of the Triton linear kernels share: records of the launchers, what is right. Imports Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from harness import generator
from torch import Tensor
from triton_tiling import DEVICE

from mmkernels.ops.common.cases import normal
from mmkernels.ops.linear import formula
from mmkernels.ops.linear.cases import head, targets
from mmkernels.ops.linear.linear_cross_entropy import spec
from mmkernels.ops.linear.linear_cross_entropy import triton as cross_entropy
from mmkernels.ops.linear.linear_logprobs import triton as logprobs
from mmkernels.ops.linear.rows import GradientArguments, StateArguments, reference_gradients, reference_states

PRECISE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The error, as a share of the largest number of a result, that a dtype may have."""


def states_record(
    rows: int, tokens: int, dim: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, weighted: bool = False,
    ignored: float = 0.3, transposed: bool = False, scale: float = 4.0, **more: Any,
) -> StateArguments:  # fmt: skip
    """Returns a record on the tests' device; the third row's token is elsewhere."""
    g = generator(rows + tokens)
    hidden, weight = head(g, rows, tokens, dim, scale, transposed)
    target = targets(g, rows, tokens, ignored, formula.IGNORED)
    if rows > 2:
        target[2] = tokens
    record = StateArguments(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        bias=normal(g, tokens).float() if bias else None,
        target=target,
        token_weight=torch.rand(tokens, generator=g) if weighted else None,
        **{"softcap": 0.0, "temperature": 1.0, "entropy": False, "best": False} | more,
    )
    return on(record, DEVICE)


def gradients_record(states: StateArguments, **more: Any) -> GradientArguments:
    """Returns the record of a backward pass, whose rows' factors are drawn."""
    reference, total = reference_states(wide(states))[0][[formula.REFERENCE, formula.SUM]]
    softmax = torch.stack([reference, total.log()]).float().to(states.hidden.device)
    rows = normal(generator(), 4, len(states.target)).to(softmax)
    given = {name: getattr(states, name) for name in states._fields if name != "best"}
    needs = {"need_hidden": True, "need_weight": True, "need_bias": states.bias is not None}
    return GradientArguments(softmax=softmax, rows=rows, **given | {"wide": False} | needs | more)


def loss_record(states: StateArguments, **more: Any) -> spec.Arguments:
    """Returns the record of a loss that keeps all gradients; of its rows' factors the target's is the largest."""
    rows = torch.rand(3, len(states.target), generator=generator()) * torch.tensor([[1.0], [1e-2], [1e-2]])
    rows = rows.to(states.hidden.device).masked_fill(states.target == formula.IGNORED, 0.0)
    # The loss is NaN where a token is elsewhere.
    target = torch.where(states.target >= len(states.weight), 0, states.target)
    given = (*states[:3], target, states.token_weight, None, rows, states.softcap, True)
    return spec.Arguments(*given, True, True, states.bias is not None)._replace(**more)


def on(record: Any, device: str) -> Any:
    return record._make(x.to(device) if isinstance(x, Tensor) else x for x in record)


def wide(record: Any) -> Any:
    """Returns the record on the CPU, with all floating tensors in float64."""
    return record._make(
        (x.double() if x.is_floating_point() else x).cpu() if isinstance(x, Tensor) else x for x in record
    )


def lse_of(states: Tensor) -> Tensor:
    return states[formula.REFERENCE] + states[formula.SUM].log()


def meanings(record: StateArguments, states: Tensor, index: Tensor) -> list[Tensor]:
    """Returns what a state means, whatever its reference is."""
    lse = lse_of(states)
    entropy = states[formula.SUM].log() - states[formula.MOMENT] / states[formula.SUM]
    found = [lse, *states[[formula.PICKED, formula.TOTAL, formula.BEST]], index]
    return [*found, entropy] if record.entropy else found


def check_states(record: StateArguments) -> None:
    found = meanings(record, *logprobs.states(record))
    assert_close(found, meanings(record, *reference_states(wide(record))), PRECISE[torch.float32], least=1.0)


def check_gradients(record: GradientArguments) -> None:
    assert_close(logprobs.gradients(record), reference_gradients(wide(record)), PRECISE[record.hidden.dtype])


def check_loss(record: spec.Arguments) -> None:
    assert_close(cross_entropy.forward(record), spec.reference(wide(record)), PRECISE[record.hidden.dtype])


def assert_close(found: Sequence[Tensor], want: Sequence[Tensor], share: float, least: float = 0.0) -> None:
    """Assert that each result differs by a share of its largest finite number, or of `least`, and is written."""
    for number, (a, b) in enumerate(zip(found, want, strict=True)):
        finite = b[b.isfinite()]
        most = share * max(least, float(finite.abs().max()) if finite.numel() else 1.0)
        message = f"result {number}: {{}}".format
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=0.0, atol=most, equal_nan=True, msg=message)
