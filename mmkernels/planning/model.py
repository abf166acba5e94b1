"""The cost model: how long the hops of a ring take, and which of compute, memory and wire binds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmkernels.planning.devices import DataSheet
from mmkernels.planning.ring import Hop, Step, hops, memory_parts, sent_bytes

__all__ = ["Curve", "MeasuredRates", "Prediction", "Rates", "SheetRates", "hidden_from", "predict"]

_FLOPS = {False: 2.0, True: 6.0}  # for each logit and channel, of a block forward and backward


class Rates(Protocol):
    """How fast one rank and its link are.

    Attributes:
        sharing: ranks for each core or accelerator, at least 1.
        memory_bytes: that a rank may take.
    """

    @property
    def sharing(self) -> float: ...

    @property
    def memory_bytes(self) -> float: ...

    def block(self, hop: Hop, dim: int) -> float:
        """Returns the seconds of one block on a rank that shares its core with no other."""

    def handling(self, size: int) -> float:
        """Returns the seconds that a rank's core is busy with sending and receiving so many bytes."""

    def wire(self, size: int) -> float:
        """Returns the seconds that so many bytes are on their way, while the rank may compute."""


@dataclass(frozen=True)
class SheetRates:
    """Rates by a data sheet.

    Args:
        sheet: the accelerator.
        dtype: of the features.
        share: of the peak that a block reaches.
        wire_rate: bytes a second between two ranks.
        latency: seconds of a hop beside its bytes: launches and the message's start.
    """

    sheet: DataSheet
    dtype: str
    share: float
    wire_rate: float
    latency: float = 20e-6
    sharing: float = 1.0

    @property
    def memory_bytes(self) -> float:
        return self.sheet.memory_bytes

    def block(self, hop: Hop, dim: int) -> float:
        flops = _FLOPS[hop.backward] * hop.rows * hop.columns * dim
        moved = (hop.rows + hop.columns) * dim * (4 if self.dtype == "fp32" else 2)
        if hop.backward:
            moved += 2 * (hop.rows + hop.columns) * dim * 4  # both accumulators, read and written
        return max(flops / (self.share * self.sheet.flops[self.dtype]), moved / self.sheet.memory_rate)

    def handling(self, size: int) -> float:
        return 0.0

    def wire(self, size: int) -> float:
        return self.latency + size / self.wire_rate if size else 0.0


@dataclass(frozen=True)
class Curve:
    """A measured time by size, straight between the points in logarithms; beyond the largest it grows with the size.

    Args:
        points: (size, seconds), by size.
    """

    points: Sequence[tuple[float, float]]

    def at(self, size: float) -> float:
        """Returns the seconds at a size."""
        (first, least), (last, most) = self.points[0], self.points[-1]
        if size <= first:
            return least * (size / first) ** self._slope(0) if len(self.points) > 1 else least * size / first
        if size >= last:
            return most * size / last
        index = next(i for i, (x, _) in enumerate(self.points) if x > size) - 1
        x, y = self.points[index]
        return y * (size / x) ** self._slope(index)

    def _slope(self, index: int) -> float:
        (x, y), (x_next, y_next) = self.points[index], self.points[index + 1]
        return min(max(math.log(y_next / y) / math.log(x_next / x), 0.0), 1.0)


@dataclass(frozen=True)
class MeasuredRates:
    """Rates as `measure.measure` found them.

    Args:
        forward, backward: seconds of a block by its logits, at the step's dim.
        message: seconds of sending and receiving by bytes, where both ends are on this machine.
        sharing: ranks for each core, at least 1.
        memory_bytes: that a rank may take.
        wire_rate: bytes a second between two ranks; None: they are on this machine, so that only `message` counts.
    """

    forward: Curve
    backward: Curve
    message: Curve
    sharing: float
    memory_bytes: float
    wire_rate: float | None = None

    def block(self, hop: Hop, dim: int) -> float:
        return (self.backward if hop.backward else self.forward).at(hop.rows * hop.columns)

    def handling(self, size: int) -> float:
        return self.message.at(size) if size else 0.0

    def wire(self, size: int) -> float:
        if not size:
            return 0.0
        return self.message.at(size) if self.wire_rate is None else size / self.wire_rate


@dataclass(frozen=True)
class Prediction:
    """What a step costs one rank.

    Args:
        step: which one.
        seconds: of forward and backward pass.
        compute_seconds: of its blocks, those of other ranks on the same core included.
        wire_seconds: that its bytes take, if nothing else did.
        sent: bytes that it sends.
        memory: bytes at the peak, by what they are for.
        binds: "compute", "memory" (the step does not fit) or "wire".
    """

    step: Step
    seconds: float
    compute_seconds: float
    wire_seconds: float
    sent: int
    memory: dict[str, int]
    binds: str

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


def predict(step: Step, rates: Rates) -> Prediction:
    """Returns what a step costs: each hop takes the longer of its block and its wire."""
    total = compute = wire = 0.0
    for hop in hops(step):
        busy = rates.sharing * (rates.block(hop, step.dim) + rates.handling(hop.sent))
        on_wire = rates.wire(hop.sent)
        total += hop.count * max(busy, on_wire)
        compute += hop.count * busy
        wire += hop.count * on_wire
    memory = memory_parts(step)
    binds = "wire" if wire > compute else "compute"
    if sum(memory.values()) > rates.memory_bytes:
        binds = "memory"
    return Prediction(step, total, compute, wire, sent_bytes(step), memory, binds)


def hidden_from(step: Step, rates: Rates) -> int | None:
    """Returns the least batch, in whole pairs a rank, from which no hop waits for the wire; None: none up to 2^40."""
    if step.ranks == 1:
        return step.ranks

    def hidden(rows: int) -> bool:
        return all(
            rates.sharing * (rates.block(hop, step.dim) + rates.handling(hop.sent)) >= rates.wire(hop.sent)
            for hop in hops(Step(rows * step.ranks, step.dim, step.ranks, step.dtype))
        )

    most = 2**40 // step.ranks
    if not hidden(most):
        return None
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        if hidden(middle):
            most = middle
        else:
            least = middle
    return most * step.ranks
