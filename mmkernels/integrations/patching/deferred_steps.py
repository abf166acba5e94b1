"""What was done to logits that are not computed yet, and what a linear op needs to know of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One function of logits x ``[..., V]`` that does not mix rows.

    Args:
        kind: "cast", "mul", "div", "add", "tanh", "log_softmax", "softmax" or "exp"; or "times_log", which makes
            p log p of log-probabilities.
        value: the dtype of "cast", "log_softmax" and "softmax"; the operand of "mul", "div" and "add": a number, a
            tensor of one element, or for "add" ``[V]``.
    """

    kind: str
    value: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "cast":
            return x.to(self.value)
        if self.kind == "mul":
            return x * self.value
        if self.kind == "div":
            return x / self.value
        if self.kind == "add":
            return x + self.value
        if self.kind == "tanh":
            return torch.tanh(x)
        if self.kind == "log_softmax":
            return torch.log_softmax(x, -1, dtype=self.value)
        if self.kind == "softmax":
            return torch.softmax(x, -1, dtype=self.value)
        if self.kind == "exp":
            return torch.exp(x)
        assert self.kind == "times_log", self.kind
        return torch.exp(x) * x

    @property
    def tensor(self) -> Tensor | None:
        return self.value if isinstance(self.value, Tensor) else None


class Form(NamedTuple):
    """Logits as ``y = scale (hidden weight') + bias``, or ``cap tanh(scale / cap (hidden weight') + bias / cap)``.

    Args:
        scale: of the product, before the cap; a tensor of one element, or a number.
        bias: ``[V]`` or None.
        cap: a positive number; 0.0: none.
        kind: "logits", "log_softmax", "softmax" or "times_log": what the values are.
    """

    scale: Any
    bias: Tensor | None
    cap: float
    kind: str


def form_of(bias: Tensor | None, steps: tuple[Step, ...]) -> Form | None:
    """Returns logits after all steps in the form that linear ops compute; None: they have another.

    Args:
        bias: of the linear layer.
    """
    scale: Any = 1.0
    after: float | None = None  # of the tanh
    kind = "logits"
    for step in steps:
        if step.kind == "cast":
            continue
        if kind != "logits":
            if (kind, step.kind) == ("log_softmax", "exp"):
                kind = "softmax"
            elif (kind, step.kind) == ("log_softmax", "times_log"):
                kind = "times_log"
            else:
                return None
        elif step.kind in ("mul", "div"):
            factor = step.value if step.kind == "mul" else 1.0 / step.value
            if after is None:
                scale = scale * factor
                bias = None if bias is None else bias * factor
            elif isinstance(factor, Tensor):
                return None
            else:
                after *= factor
        elif step.kind == "tanh" and after is None and not isinstance(scale, Tensor):
            after = 1.0
        elif step.kind == "add" and after is None and step.value.numel() > 1:
            bias = step.value if bias is None else bias + step.value
        elif step.kind in ("log_softmax", "softmax"):
            kind = step.kind
        else:
            return None
    return _capped(scale, bias, after, kind)


def _capped(scale: Any, bias: Tensor | None, after: float | None, kind: str) -> Form | None:
    """Returns the form of ``after tanh(scale z + bias)``, or without a tanh where `after` is None."""
    if after is None:
        return Form(scale, bias, 0.0, kind)
    if after == 0.0:
        return None
    scale = scale * after
    if abs(scale - 1.0) < 1e-12:  # as in z / cap, tanh, * cap
        scale = 1.0
    return Form(scale, None if bias is None else bias * after, abs(after), kind)
