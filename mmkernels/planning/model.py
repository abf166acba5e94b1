"""The cost model: how long pieces take round the ring, and which of compute, memory and wire binds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mmkernels.planning.devices import DataSheet
from mmkernels.planning.ring import Pass, Step, memory_parts, passes, sent_bytes

__all__ = ["Curve", "MeasuredRates", "Prediction", "Rates", "SheetRates", "Took", "hidden_from", "predict"]

_FLOPS = {False: 2.0, True: 6.0}  # for each logit and channel, of a block forward and backward
_GATHERS = 4  # of what all ranks say, in a step
_STEADY = 8  # visits after which each takes as long as the one before


class Rates(Protocol):
    """How fast one rank and its link are."""

    @property
    def memory_bytes(self) -> float:
        """That a rank may take."""
        ...

    def start(self, ranks: int) -> float:
        """Returns the seconds that a step takes beside its visits: handshakes, and what is computed once."""
        ...

    def call(self, ranks: int) -> float:
        """Returns the seconds of a visit whatever its size."""
        ...

    def visit(self, made: Pass, step: Step) -> float:
        """Returns the seconds that a rank is busy with a piece that visits it, and with passing it on."""
        ...

    def wire(self, size: int) -> float:
        """Returns the seconds that so many bytes are on their way, while the rank may compute."""
        ...


@dataclass(frozen=True)
class SheetRates:
    """Rates by a data sheet.

    Args:
        sheet: the accelerator.
        dtype: of the features.
        share: of the peak that a block reaches.
        wire_rate: bytes a second between two ranks.
        latency: seconds that a message takes beside its bytes.
        host: seconds that the host needs to launch what a visit takes; the GPU works meanwhile.
    """

    sheet: DataSheet
    dtype: str
    share: float
    wire_rate: float
    latency: float = 20e-6
    host: float = 200e-6

    @property
    def memory_bytes(self) -> float:
        return self.sheet.memory_bytes

    def start(self, ranks: int) -> float:
        return 0.0

    def call(self, ranks: int) -> float:
        return self.host

    def visit(self, made: Pass, step: Step) -> float:
        blocks = sum(many * self._block(rows, columns, step.dim, made) for many, rows, columns in made.blocks)
        return max(self.host, blocks)

    def _block(self, rows: int, columns: int, dim: int, made: Pass) -> float:
        flops = _FLOPS[made.backward] * rows * columns * dim
        moved = (rows + columns) * dim * (4 if self.dtype == "fp32" else 2)
        if made.backward:
            moved += 2 * (rows + columns) * dim * 4  # both gradients, read and written
        return max(flops / (self.share * self.sheet.flops[self.dtype]), moved / self.sheet.memory_rate)

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
            return least
        if size >= last:
            return most * size / last
        index = next(i for i, (x, _) in enumerate(self.points) if x > size) - 1
        (x, y), (x_next, y_next) = self.points[index], self.points[index + 1]
        slope = min(max(math.log(y_next / y) / math.log(x_next / x), 0.0), 1.0)
        return y * (size / x) ** slope

    def above_least(self, size: float) -> float:
        """Returns the seconds at a size above those of the smallest one."""
        return max(self.at(size) - self.points[0][1], 0.0)


class Took(NamedTuple):
    """The time of one call.

    Args:
        seconds: until it ended.
        busy: that a core worked for it, in this rank's process.
    """

    seconds: float
    busy: float


@dataclass(frozen=True)
class MeasuredRates:
    """Rates as `measure` found them.

    Where ranks share a core, what keeps it busy takes turns, and what waits does not.

    Args:
        forward, backward: seconds of a block by its logits, of the shapes that the ring has at the step's dim.
        handling: seconds that a core is busy with sending and receiving, by bytes.
        alone, pair: a step of the fewest rows, of one rank and of two.
        sharing: ranks for each core, at least 1.
        memory_bytes: that a rank may take.
        wire_rate: bytes a second between two ranks; None: they are on one machine, where only `handling` counts.
    """

    forward: Curve
    backward: Curve
    handling: Curve
    alone: Took
    pair: Took
    sharing: float
    memory_bytes: float
    wire_rate: float | None = None

    def start(self, ranks: int) -> float:
        return self._turns(1.0, _GATHERS * (ranks - 1))

    def call(self, ranks: int) -> float:
        return self._turns(0.0, (2 * ranks - 1) / ranks)  # a piece passes on W - 1 times, its results follow W times

    def _turns(self, alone: float, messages: float) -> float:
        """Returns the seconds of so many steps of one rank and so many of the smallest messages.

        The smallest step of two ranks takes ten messages more than that of one: four gathers and six exchanges.
        """
        waits, busy = (
            alone * one + messages * max(two - one, 0.0) / (_GATHERS + 6)
            for one, two in zip(self.alone, self.pair, strict=True)
        )
        return max(waits, self.sharing * busy)

    def visit(self, made: Pass, step: Step) -> float:
        curve = self.backward if made.backward else self.forward
        blocks = sum(many * curve.at(rows * columns) for many, rows, columns in made.blocks) - curve.points[0][1]
        messages = sum(self.handling.above_least(size) for size in (made.passed, made.follows) if size)
        return self.call(step.ranks) + self.sharing * (max(blocks, 0.0) + messages)

    def wire(self, size: int) -> float:
        return 0.0 if self.wire_rate is None else size / self.wire_rate


@dataclass(frozen=True)
class Prediction:
    """What a step costs one rank.

    Args:
        step: which one.
        seconds: of forward and backward pass.
        compute_seconds: that the rank is busy, the turns of other ranks on the same core included.
        wire_seconds: that its bytes take, if nothing else did.
        sent: bytes that it sends.
        memory: bytes at the peak, by what they are for.
        binds: "compute", "memory" (the step does not fit), "wire", or "calls": what visits cost whatever their size.
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
    """Returns what a step costs."""
    w = step.ranks
    total = compute = calls = rates.start(w)
    wire = 0.0
    for made in passes(step):
        busy = rates.visit(made, step)
        passed, follows = rates.wire(made.passed), rates.wire(made.follows)
        total += made.count * _round(w, busy, passed, follows)
        compute += made.count * w * busy
        calls += made.count * w * rates.call(w)
        wire += made.count * ((w - 1) * passed + w * follows)
    memory = memory_parts(step)
    binds = "wire" if wire > compute else "calls" if calls > compute / 2 else "compute"
    if sum(memory.values()) > rates.memory_bytes:
        binds = "memory"
    return Prediction(step, total, compute, wire, sent_bytes(step), memory, binds)


def _round(ranks: int, busy: float, passed: float, follows: float) -> float:
    """Returns the seconds in which a piece of each rank visits all, in the order of `group.circulate`.

    Args:
        busy: seconds of a visit.
        passed, follows: seconds that the piece, and its results, are on the wire.
    """
    if ranks > _STEADY:
        last, before = (_round(count, busy, passed, follows) for count in (_STEADY, _STEADY - 1))
        return last + (ranks - _STEADY) * (last - before)
    now = free = results = 0.0  # the rank's time, and when the link is free and the results have come
    for visit in range(ranks):
        piece = 0.0
        if visit + 1 < ranks:
            piece = free = max(free, now) + passed
        now = max(now + busy, results)
        results = free = max(free, now) + follows
        now = max(now, piece)
    return max(now, results)


def hidden_from(step: Step, rates: Rates) -> int | None:
    """Returns the least batch, in whole pairs a rank, from which no visit waits for the wire; None: none up to 2^36."""
    if step.ranks == 1:
        return step.ranks

    def hidden(rows: int) -> bool:
        larger = Step(rows * step.ranks, step.dim, step.ranks, step.dtype, step.gpu)
        return all(
            rates.visit(made, larger) >= rates.wire(made.passed) + rates.wire(made.follows) for made in passes(larger)
        )

    most = 2**36 // step.ranks
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
