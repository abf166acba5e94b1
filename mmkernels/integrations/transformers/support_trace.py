"""Watches one forward pass of a model: which modules call ``"mmkernels"``, how often, and what waits for a device."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmkernels.integrations.transformers.counts import Calls, counting
from mmkernels.testing.models import Inputs

_READS = {
    *("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose"),
}
"""Functions of PyTorch that need a tensor's values to go on, by name."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass did.

    Args:
        calls: attention calls, by mask.
        inside, outside: how many modules of each attention class called ``"mmkernels"``, and how many did not.
        calls_a_layer: the most calls that one run of one of these modules made.
        syncs_a_layer: the most waits for a device in one run of one of these modules; see `Waits`.
        syncs: all waits of the forward pass.
    """

    calls: Calls = field(default_factory=Calls)
    inside: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    calls_a_layer: int = 0
    syncs_a_layer: int = 0
    syncs: int = 0


class Waits(TorchFunctionMode):
    """Counts where Python code reads a tensor's values, for which it would wait if the tensor lay on a device.

    mmkernels' own code is left out: it looks at values that lie on a CPU, and does not wait for a device in a call.
    """

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads(function, args, kwargs or {}) and not _of_mmkernels(sys._getframe(1)):
            self.count += 1
        return function(*args, **(kwargs or {}))


def _reads(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name in ("__getitem__", "__setitem__"):  # by a bool tensor: as many elements as are True
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in places)
    if name == "repeat_interleave":
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
    if name == "where":
        return len(args) + len(kwargs) == 1
    return name in _READS


def _of_mmkernels(frame: FrameType | None) -> bool:
    """Returns whether the innermost function of no package of torch's belongs to mmkernels."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mmkernels"


def trace(model: Any, inputs: Inputs) -> Trace:
    """Runs one forward pass and returns what it did.

    A call belongs to the innermost module that runs, whatever its name; a module that makes none is an attention by its
    class's name, unless it contains another one or is a part of a module that made a call.
    """
    runs = _Runs()
    with torch.no_grad(), torch.random.fork_rng(devices=()), runs.counted() as stack:
        for module in model.modules():
            for hook in runs.watch(module):
                stack.callback(hook.remove)
        model(**inputs)
    inside = [module for module, did_call in runs.called.items() if did_call]
    within = {part for module in inside for part in module.modules()}
    outside = [module for module in _attention_modules(model) if module in runs.called and module not in within]
    return Trace(
        runs.calls,
        Counter(type(module).__name__ for module in inside),
        Counter(type(module).__name__ for module in outside),
        max((runs.most_calls[module] for module in inside), default=0),
        max((runs.most_waits[module] for module in inside), default=0),
        runs.waits.count,
    )


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules whose class is named as attention, without those that contain another one."""
    named = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    return [module for module in named if not set(module.modules()) & set(named) - {module}]


class _Runs:
    """What each module's runs did: `called` whether every one made a call of its own, and the most that one made."""

    def __init__(self) -> None:
        self.calls, self.waits = Calls(), Waits()
        self.called: dict[nn.Module, bool] = {}
        self.most_calls, self.most_waits = Counter[nn.Module](), Counter[nn.Module]()
        self._calls_before: list[int] = []  # for each module that runs: the calls before it, and those of its parts
        self._waits_before: list[int] = []

    def counted(self) -> ExitStack:
        """Returns a context in which calls and waits are counted."""
        stack = ExitStack()
        self.calls = stack.enter_context(counting())
        stack.enter_context(self.waits)
        return stack

    def watch(self, module: nn.Module) -> list[Any]:
        """Registers hooks before and after each run of the module."""
        return [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._end)]

    def _start(self, module: nn.Module, args: Any) -> None:
        self._calls_before.append(self.calls.total)
        self._waits_before.append(self.waits.count)

    def _end(self, module: nn.Module, args: Any, out: Any) -> None:
        made = self.calls.total - self._calls_before.pop()
        self._calls_before[:] = [before + made for before in self._calls_before]
        self.called[module] = self.called.get(module, True) and made > 0
        self.most_calls[module] = max(self.most_calls[module], made)
        self.most_waits[module] = max(self.most_waits[module], self.waits.count - self._waits_before.pop())
