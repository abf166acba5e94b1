"""Whether a result is right: beside the definition in float64, as much of the problem as the device's memory holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.spec import Answer, Cut, Inputs, OpSpec, cast, flatten

Call = Callable[[], Any]

_TENSORS = 8  # of the scores' size, in float64, that the naive formula and its gradients keep at once


class Gate:
    """Outputs and gradients of one call, judged by the op's definition.

    Where the naive formula in float64 would not fit into half of the device's memory, the whole result must be finite,
    and it is compared on the parts that the op's spec names: each is a problem of its own at the full lengths, so that
    every output and gradient in it is compared, sums over all queries included; or the spec itself says what is right.

    Args:
        inputs: of the op, those to differentiate by with ``requires_grad``.
        grads: names of the arguments differentiated by; empty: outputs only.
        cotangents: one for each output, where there are grads.
    """

    def __init__(self, spec: OpSpec, inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> None:
        self._spec = spec
        self.partial = not _fits(spec, inputs)
        self._answers = self._judged(inputs, grads, cotangents)

    def _judged(self, inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> Sequence[Answer]:
        cuts: Sequence[Cut] = (_everything,)
        if self.partial:
            parts = self._spec.parts
            assert parts is not None
            if parts.answers is not None:
                return parts.answers(inputs, grads, cotangents)
            assert parts.cuts is not None
            cuts = parts.cuts(inputs)
        return [Answer(partial(_cut, cut), *self._answer(cut, inputs, grads, cotangents)) for cut in cuts]

    def _answer(
        self, cut: Cut, inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The definition's results in the inputs' dtype and in float64."""
        part = {name: cut(x) for name, x in inputs.items()}
        found = []
        for given in (part, cast(part, torch.float64, _device(inputs))):
            given = {
                name: x.detach().requires_grad_(name in grads) if isinstance(x, Tensor) else x
                for name, x in given.items()
            }
            call = partial(self._spec.function, **given, backend="reference")
            leaves = [given[name] for name in grads]
            found.append(flat(with_gradients(call, leaves, [cut(x) for x in cotangents])()))
        return found[0], found[1]

    def problem(self, found: Sequence[Tensor]) -> str | None:
        """What is wrong with the op's own results, outputs and then gradients; or None."""
        for place, mine in enumerate(found):
            if self.partial and not bool((mine.isfinite() | (mine == -torch.inf)).all()):  # -inf: of a lse
                return f"result {place}: not finite"
            for share, naive, true in self._answers:
                problem = self._spec.over_budget(share(place, mine), naive[place], true[place])
                if problem is not None:
                    return f"result {place}: {problem}"
        return None

    def distance(self, found: Sequence[Tensor]) -> float:
        """The largest distance of a result from the truth, as a share of the truth's size; inf where shapes differ."""
        worst = 0.0
        for share, _, truth in self._answers:
            for place, (mine, true) in enumerate(zip(found, truth, strict=False)):
                mine = share(place, mine)
                if mine.shape != true.shape:
                    return float("inf")
                off = _rms(mine.to(true) - true) / max(_rms(true), 1e-30)
                worst = max(worst, off)
        return worst


def with_gradients(call: Call, leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Call:
    """`call`, or `call` and the gradients by `leaves`, if there are any."""
    if not leaves:
        return call

    def both() -> tuple[Tensor, ...]:
        outputs = flatten(call())
        directions = [x.to(y) for x, y in zip(cotangents, outputs, strict=True)]
        return (*outputs, *torch.autograd.grad(outputs, leaves, directions))

    return both


def draw_cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed directions for gradients."""
    found = []
    for number, x in enumerate(outputs):
        generator = torch.Generator(x.device).manual_seed(1 + number)
        found.append(torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype))
    return found


def flat(out: Any) -> list[Tensor]:
    """A call's result as a list of tensors without a graph."""
    return [x.detach() for x in flatten(out)]


def memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def room(device: torch.device) -> float:
    """Bytes that the definition may take."""
    return memory(device) / 2


def _fits(spec: OpSpec, inputs: Inputs) -> bool:
    return spec.parts is None or 8 * _TENSORS * spec.parts.elements(inputs) <= room(_device(inputs))


def _device(inputs: Inputs) -> torch.device:
    return next(x.device for x in inputs.values() if isinstance(x, Tensor))


def _everything(x: Any) -> Any:
    return x


def _cut(cut: Cut, place: int, x: Tensor) -> Tensor:
    part: Tensor = cut(x)
    return part


def _rms(x: Tensor) -> float:
    return float(x.double().nan_to_num().square().mean().sqrt()) if x.numel() else 0.0
