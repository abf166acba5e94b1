"""Whether a result is right: compared with the definition in float64, as much of it as the device's memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.bench.peers import Call as Call
from mmkernels.machine import memory_of
from mmkernels.spec import Expected, Inputs, OpSpec, Shard, cast, flatten

_TENSORS = 8  # of the scores' size in float64, which the naive formula and its gradients keep at once
_COPIES = 3  # of the inputs in float64: they, their gradients, and those that are kept to compare with


class Gate:
    """Judges outputs and gradients of one call by the op's definition.

    Where the naive formula in float64 would not fit into half of the device's memory, the whole result must be finite,
    and the parts that the op's spec names are compared: shards that can be computed alone at the full lengths, so that
    every output and gradient in them is compared, sums over all queries included; or slices of which the spec
    itself says what is right.

    Args:
        inputs: of the op, those to differentiate by with ``requires_grad``.
        grads: names of the arguments differentiated by; empty: outputs only.
        cotangents: one for each output, where there are grads.
        parts_only: compare the parts, if the spec names any, even where all would fit.
    """

    def __init__(
        self,
        spec: OpSpec,
        inputs: Inputs,
        grads: Sequence[str],
        cotangents: Sequence[Tensor],
        *,
        parts_only: bool = False,
    ) -> None:
        self._spec, self._grads = spec, grads
        self.partial = spec.parts is not None and (parts_only or not _fits(spec, inputs))
        self._expected = list(self._all_expected(inputs, cotangents))

    def _all_expected(self, inputs: Inputs, cotangents: Sequence[Tensor]) -> Iterator[Expected]:
        parts = self._spec.parts
        shards: Sequence[Shard] = (_everything,)
        if self.partial:
            assert parts is not None
            if parts.expected is not None:
                yield from parts.expected(inputs, self._grads, cotangents)
                return
            assert parts.shards is not None
            shards = parts.shards(inputs)
        for shard in shards:
            yield Expected(partial(_of_shard, shard), *self._definition(shard, inputs, cotangents))

    def _definition(
        self, shard: Shard, inputs: Inputs, cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the definition's results in the inputs' dtype and in float64."""
        part = {name: shard(x) for name, x in inputs.items()}
        results = []
        for given in (part, cast(part, torch.float64, _device(inputs))):
            given = {
                name: x.detach().requires_grad_(name in self._grads) if isinstance(x, Tensor) else x
                for name, x in given.items()
            }
            call = partial(self._spec.function, **given, backend="reference")
            leaves = [given[name] for name in self._grads]
            results.append(flat(with_gradients(call, leaves, [shard(x) for x in cotangents])()))
        return results[0], results[1]

    def problem(self, results: Sequence[Tensor]) -> str | None:
        """Returns what is wrong with the op's results, outputs and then gradients; or None."""
        outputs = len(results) - len(self._grads)
        names = [f"output {n}" for n in range(outputs)] + [f"gradient of {name}" for name in self._grads]
        for index, (name, result) in enumerate(zip(names, results, strict=True)):
            if self.partial and not bool((result.isfinite() | (result == -torch.inf)).all()):  # -inf: of a lse
                return f"{name}: not finite"
            for share, naive, true in self._expected:
                problem = self._spec.over_budget(share(index, result), naive[index], true[index])
                if problem is not None:
                    return f"{name}: {problem}"
        return None

    def distance(self, results: Sequence[Tensor]) -> float:
        """Returns the largest relative distance of a result from the truth; inf where shapes differ."""
        worst = 0.0
        for share, _, truth in self._expected:
            for index, (result, true) in enumerate(zip(results, truth, strict=False)):
                part = share(index, result)
                if part.shape != true.shape:
                    return float("inf")
                worst = max(worst, _rms(part.to(true) - true) / max(_rms(true), 1e-30))
        return worst


def draw_inputs(
    spec: OpSpec,
    make: Callable[[torch.Generator], Inputs],
    dtype: torch.dtype,
    device: torch.device,
    grads: Sequence[str],
) -> Inputs:
    """Returns the op's arguments, the same at each call; those to differentiate by are leaves."""
    with device:
        drawn = make(torch.Generator(device).manual_seed(0))
    inputs = cast(drawn, dtype, device, spec.always_wide)
    return {name: x.detach().requires_grad_() if name in grads else x for name, x in inputs.items()}


def with_gradients(call: Call, leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Call:
    """Returns `call`, or `call` and the gradients by `leaves`, if there are any, of those results that have one."""
    if not leaves:
        return call

    def both() -> tuple[Tensor, ...]:
        outputs = flatten(call())
        flows = [(y, x.to(y)) for x, y in zip(cotangents, outputs, strict=True) if y.requires_grad]
        return (*outputs, *torch.autograd.grad([y for y, _ in flows], leaves, [x for _, x in flows]))

    return both


def draw_cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns fixed directions for gradients; 1 for a loss, from which a training step goes back."""
    drawn = []
    for number, x in enumerate(outputs):
        if not x.dim():
            drawn.append(torch.ones_like(x))
            continue
        generator = torch.Generator(x.device).manual_seed(1 + number)
        drawn.append(torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype))
    return drawn


def flat(out: Any) -> list[Tensor]:
    """Returns a call's result as a list of tensors without a graph."""
    return [x.detach() for x in flatten(out)]


def room(device: torch.device) -> float:
    """Returns the bytes that the definition may take."""
    return memory_of(device) / 2


def _fits(spec: OpSpec, inputs: Inputs) -> bool:
    if spec.parts is None:
        return True
    given = sum(x.numel() for x in inputs.values() if isinstance(x, Tensor))
    return 8 * (_TENSORS * spec.parts.elements(inputs) + _COPIES * given) <= room(_device(inputs))


def _device(inputs: Inputs) -> torch.device:
    return next(x.device for x in inputs.values() if isinstance(x, Tensor))


def _everything(x: Any) -> Any:
    return x


def _of_shard(shard: Callable[[Any], Tensor], index: int, result: Tensor) -> Tensor:
    return shard(result)


def _rms(x: Tensor) -> float:
    return float(x.double().nan_to_num().square().mean().sqrt()) if x.numel() else 0.0
