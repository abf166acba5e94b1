"""What a row of bench_integrations.py found, and what it must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models_targets import Limit

from mmkernels.profiling.point import REMOVED
from mmkernels.targets import OURS

EAGER, SDPA = "eager", "sdpa"
"""The model's own implementations of attention; "eager" of those that have one alone."""


@dataclass(frozen=True)
class Found:
    """What was measured of one row.

    Args:
        seconds: the median time of each candidate: `OURS`, the model's own, `REMOVED` (patched, without the ops).
        attention: the median time of the attention modules without their linear layers, by candidate; 0: there are
            none with a target.
        calls: the median time of the attention op's calls in a run of ours.
        flops: of these calls, of what their masks show.
        memory: bytes of `OURS` and each of its own: the peak above the model and its inputs; of a training step what
            its forward pass keeps for the backward pass, but for gradients. None: can't be measured.
        products: FLOP of the loss.
        peak_flops: FLOP a second that the machine sustained between the runs.
    """

    seconds: Mapping[str, float]
    attention: Mapping[str, float]
    calls: float
    flops: float
    memory: Mapping[str, int | None]
    products: float
    peak_flops: float

    @property
    def peer(self) -> str:
        """The fastest of the model's own implementations."""
        own = [name for name in self.seconds if name not in (OURS, REMOVED)]
        return min(own, key=lambda name: self.seconds[name])

    @property
    def ratio(self) -> float:
        """How many times faster than the fastest of its own ours is."""
        return self.seconds[self.peer] / self.seconds[OURS]

    @property
    def share_of_cap(self) -> float:
        """Of the speed-up that removing the ops would bring."""
        return self.seconds[REMOVED] / self.seconds[OURS]

    @property
    def share_of_peak(self) -> float | None:
        """The rate of the attention calls, as a share of the arithmetic peak; None: there are no calls."""
        return self.flops / self.calls / self.peak_flops if self.calls else None

    @property
    def attention_ratio(self) -> float | None:
        """How many times faster than eager's the attention modules are, their linear layers left out."""
        ours, theirs = self.attention[OURS], self.attention.get(EAGER)
        return theirs / ours if ours and theirs else None

    @property
    def memory_share(self) -> float | None:
        """Our memory as a share of its own."""
        ours, theirs = self.memory[OURS], self.memory[self.peer]
        return None if ours is None or not theirs else ours / theirs

    @property
    def loss_at_peak(self) -> float | None:
        """The time of the loss at the arithmetic peak, over the time that it adds to the step."""
        added = self.seconds[OURS] - self.seconds[REMOVED]
        return self.products / self.peak_flops / added if self.products and added > 0 else None


AS_FAST = Limit("forward, its own fastest", "ratio", lambda found: found.ratio, least=0.95)
CAP = Limit("share of cap", "share", lambda found: found.share_of_cap, least=0.85)
AT_PEAK = Limit("loss, of at peak", "share", lambda found: found.loss_at_peak, least=0.75)
THIRD_MEMORY = Limit("activations, of its own", "share", lambda found: found.memory_share, most=1 / 3)
PEAK = (
    Limit("attention, eager's", "ratio", lambda found: found.attention_ratio, least=1.0),
    Limit("attention, of FMA peak", "share", lambda found: found.share_of_peak, least=0.60),
)
