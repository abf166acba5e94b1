"""Targets: what a benchmark row must reach, one small class for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

OURS = "ours"
"""The op itself among the candidates of a benchmark."""


@dataclass(frozen=True)
class Measured:
    """What a benchmark measured of one row; rates are FLOP or bytes a second.

    Args:
        flops, bytes: the least work of one call.
        seconds: the median time of each candidate: `OURS`, "naive", and the peers that ran.
        memory: each candidate's peak bytes above inputs and gradients; None: can't be measured here.
        peak_flops, peak_bytes: the rates that the machine sustained, measured in the same rounds.
        backward_rate: the rate of the op's backward pass alone; None: it was not timed.
        yardstick_rate: the rate of the op at its configuration's yardstick; None: there is none.
    """

    flops: float
    bytes: float
    seconds: Mapping[str, float]
    memory: Mapping[str, float | None]
    peak_flops: float
    peak_bytes: float
    backward_rate: float | None = None
    yardstick_rate: float | None = None

    @property
    def rate(self) -> float:
        """The op's FLOP a second."""
        return self.flops / self.seconds[OURS]

    @property
    def share_of_peak(self) -> float:
        return self.rate / self.peak_flops

    @property
    def share_of_bandwidth(self) -> float:
        return self.bytes / self.seconds[OURS] / self.peak_bytes

    @property
    def seconds_at_peak(self) -> float:
        """The time of a kernel that does only the least work, at the full rate of arithmetic or of memory."""
        return max(self.flops / self.peak_flops, self.bytes / self.peak_bytes)

    def ratio(self, peer: str) -> float | None:
        """Returns how many times faster than a peer the op is; None: the peer did not run."""
        return self.seconds[peer] / self.seconds[OURS] if peer in self.seconds else None

    def ratio_at_peak(self, peer: str) -> float | None:
        """Returns the `ratio` that a kernel at the full peak would have."""
        return self.seconds[peer] / self.seconds_at_peak if peer in self.seconds else None


@dataclass(frozen=True)
class Target(ABC):
    """What a benchmark row must reach.

    Args:
        dtype, backward: which row of the configuration.
        limit: the least that must be reached; of an `upper` limit, the most that may be.
        device: the kind of device that it is set for, "cpu" or "gpu".
    """

    dtype: str
    backward: bool
    limit: float
    device: str = field(default="cpu", kw_only=True)

    unit: ClassVar[str]
    """Of the limit: "share", "ratio", "MB", "ms" or "TFLOP/s"."""
    upper: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    """A kernel at the full peak reaches 1."""

    @property
    @abstractmethod
    def name(self) -> str:
        """In tables and JSON."""

    @abstractmethod
    def reached(self, row: Measured) -> float | None:
        """Returns what the row reached; None: the peer did not run, or it can't be measured here."""

    def at_peak(self, row: Measured) -> float | None:
        """Returns what a kernel at the full peak would reach; None: the peak is no bound."""
        return 1.0 if self.bounded else None

    def judge(self, row: Measured) -> dict[str, Any]:
        """Returns the target as result files have it, with what was found."""
        return {
            "than": self.name,
            "unit": self.unit,
            "most" if self.upper else "least": self.limit,
            "found": self.reached(row),
            "at_peak": self.at_peak(row),
        }


@dataclass(frozen=True)
class PeakShare(Target):
    """A share of the arithmetic peak."""

    unit = "share"
    name = "peak"
    bounded = True

    def reached(self, row: Measured) -> float:
        return row.share_of_peak


@dataclass(frozen=True)
class BandwidthShare(Target):
    """A share of the memory bandwidth."""

    unit = "share"
    name = "bandwidth"
    bounded = True

    def reached(self, row: Measured) -> float:
        return row.share_of_bandwidth


@dataclass(frozen=True)
class AtPeakShare(Target):
    """A share of the ratio to a peer that a kernel at the full peak would have."""

    peer: str
    unit = "share"
    bounded = True

    @property
    def name(self) -> str:
        return f"{self.peer} at peak"

    def reached(self, row: Measured) -> float | None:
        return row.seconds_at_peak / row.seconds[OURS] if self.peer in row.seconds else None


@dataclass(frozen=True)
class Speedup(Target):
    """A ratio to a peer's time. For a CPU only where it holds on any of them, such as for work that a mask spares."""

    peer: str
    unit = "ratio"

    @property
    def name(self) -> str:
        return self.peer

    def reached(self, row: Measured) -> float | None:
        return row.ratio(self.peer)

    def at_peak(self, row: Measured) -> float | None:
        return row.ratio_at_peak(self.peer)


@dataclass(frozen=True)
class PeakOrPeerShare(Target):
    """A share of the arithmetic peak, or, where that asks for less, of the rate of a peer that does the same work.

    Args:
        limit: the share of the peak.
        peer, of_peer: the peer, and the share of its rate.
    """

    peer: str
    of_peer: float
    unit = "share"
    name = "peak"
    bounded = True

    def reached(self, row: Measured) -> float:
        return row.share_of_peak

    def judge(self, row: Measured) -> dict[str, Any]:
        """Returns the one of both that asks for less."""
        seconds = row.seconds.get(self.peer)
        if seconds is None or self.of_peer * row.flops / seconds >= self.limit * row.peak_flops:
            return super().judge(row)
        return Speedup(self.dtype, self.backward, self.of_peer, self.peer, device=self.device).judge(row)


@dataclass(frozen=True)
class MemoryRatio(Target):
    """How many times the op's memory a peer takes, each above inputs and gradients.

    Args:
        allowed: bytes of the op's that don't count, such as an accumulator in a wider dtype.
    """

    peer: str
    allowed: float = 0.0
    unit = "ratio"

    @property
    def name(self) -> str:
        allowed = f", {self.allowed / 1e6:,.0f} MB allowed" if self.allowed else ""
        return f"memory of {self.peer}{allowed}"

    def reached(self, row: Measured) -> float | None:
        ours, theirs = row.memory.get(OURS), row.memory.get(self.peer)
        return None if ours is None or theirs is None else theirs / max(ours - self.allowed, 1.0)


@dataclass(frozen=True)
class ExtraMemory(Target):
    """The most MB that the op may take above inputs and gradients."""

    unit = "MB"
    name = "extra MB"
    upper = True

    def reached(self, row: Measured) -> float | None:
        ours = row.memory.get(OURS)
        return None if ours is None else ours / 1e6


@dataclass(frozen=True)
class Milliseconds(Target):
    """The most that a call may take, as others have published it of one kind of device."""

    where: str
    unit = "ms"
    upper = True

    @property
    def name(self) -> str:
        return f"ms, {self.where}"

    def reached(self, row: Measured) -> float:
        return row.seconds[OURS] * 1e3

    def at_peak(self, row: Measured) -> float:
        return row.seconds_at_peak * 1e3


@dataclass(frozen=True)
class Rate(Target):
    """A rate in TFLOP/s, where `backward` that of the backward pass alone."""

    unit = "TFLOP/s"
    name = "tflops"

    def reached(self, row: Measured) -> float:
        return (row.rate if row.backward_rate is None else row.backward_rate) / 1e12

    def at_peak(self, row: Measured) -> float:
        return row.peak_flops / 1e12


@dataclass(frozen=True)
class YardstickShare(Target):
    """A share of the rate that the op reaches at its configuration's yardstick."""

    unit = "share"
    name = "yardstick"

    def reached(self, row: Measured) -> float | None:
        return None if row.yardstick_rate is None else row.rate / row.yardstick_rate
