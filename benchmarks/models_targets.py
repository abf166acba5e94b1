"""What a row of bench_models.py found, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmkernels.profiling.point import REMOVED
from mmkernels.targets import OURS

SDPA = "sdpa"
"""transformers' model on its "sdpa"."""

NAIVE = "naive"
"""Our model on the naive formula of every op."""

TEXT_ONLY, ONE_IMAGE, WITHOUT_TIMES = "text only", "one image", "without word times"
"""What the second turn, the video and word times are compared with, on our side."""

GROUPED_MM = "grouped_mm"
"""transformers' experts on PyTorch's grouped product; on `SDPA` they are a loop."""


@dataclass(frozen=True)
class Found:
    """What was measured of one row.

    Args:
        seconds: the median time of each candidate: `OURS`, `SDPA`, `REMOVED` (ours without its ops), and others, such
            as `NAIVE`.
        attention: the median time of all attention calls of a run of each candidate; of a training step, of its forward
            pass.
        memory: bytes of `OURS`, `SDPA` and, where it runs, `NAIVE`: the peak above the model and its inputs; of a
            training step what its forward pass keeps for the backward pass, no gradients. None: can't be measured.
        calls: attention calls of a run of ours.
        layers: that attend.
        flops: of these calls, of what their masks show.
        peak_flops: FLOP a second that the machine sustained between the runs.
        encoder_calls: of a run of ours.
        bytes: that these attention calls must move: what a cache holds beyond is not read.
        peak_bytes: bytes a second that the machine sustained between the runs.
        cache_share: the bytes that a token takes in our cache over those of its publication; None: they are no target.
    """

    seconds: Mapping[str, float]
    attention: Mapping[str, float]
    memory: Mapping[str, int | None]
    calls: int
    layers: int
    flops: float
    peak_flops: float
    encoder_calls: int
    bytes: int = 0
    peak_bytes: float = 1.0
    cache_share: float | None = None

    @property
    def calls_per_layer(self) -> float:
        return self.calls / self.layers

    @property
    def share_of_cap(self) -> float:
        """Of the speed-up over sdpa that removing the ops would bring."""
        return self.seconds[REMOVED] / self.seconds[OURS]

    @property
    def share_of_peak(self) -> float | None:
        """The rate of the attention calls, as a share of the arithmetic peak; None: there are no calls."""
        seconds = self.attention[OURS]
        return self.flops / seconds / self.peak_flops if seconds else None

    @property
    def share_of_bandwidth(self) -> float | None:
        """The bytes a second of the attention calls, as a share of the memory's; None: there are no calls."""
        seconds = self.attention[OURS]
        return self.bytes / seconds / self.peak_bytes if seconds else None

    @property
    def attention_ratio(self) -> float | None:
        """How many times faster than sdpa's the attention calls are."""
        ours, theirs = self.attention[OURS], self.attention[SDPA]
        return theirs / ours if ours and theirs else None

    def memory_share(self, name: str) -> float | None:
        """Our memory as a share of another candidate's."""
        ours, theirs = self.memory[OURS], self.memory[name]
        return None if ours is None or not theirs else ours / theirs

    def over_text(self) -> float:
        """The time of a second turn, over that of its text alone and of the attention to what came before."""
        added = self.attention[OURS] - self.attention[TEXT_ONLY]
        return self.seconds[OURS] / (self.seconds[TEXT_ONLY] + max(added, 0.0))

    def over(self, name: str) -> float:
        """Our time over that of another candidate."""
        return self.seconds[OURS] / self.seconds[name]


@dataclass(frozen=True)
class Limit:
    """What a row must reach: at least, or at most.

    Args:
        than: in tables and JSON.
        unit: "share", "ratio" or "calls".
        read: of what was measured; None: it can't be measured here.
    """

    than: str
    unit: str
    read: Callable[[Any], float | None]
    least: float | None = None
    most: float | None = None

    def judge(self, found: Any) -> dict[str, Any]:
        """Returns the target as result files have it, with what was found."""
        limit = {"least": self.least} if self.most is None else {"most": self.most}
        return {"than": self.than, "unit": self.unit, **limit, "found": self.read(found)}


CAP = Limit("share of cap", "share", lambda found: found.share_of_cap, least=0.85)
ONE_CALL = Limit("calls a layer", "calls", lambda found: found.calls_per_layer, most=1.0)
PEAK = Limit("attention, of FMA peak", "share", lambda found: found.share_of_peak, least=0.60)
NO_SLOWER = Limit("attention, sdpa's", "ratio", lambda found: found.attention_ratio, least=1.0)
BANDWIDTH = Limit("attention, of read bandwidth", "share", lambda found: found.share_of_bandwidth, least=0.75)
NEVER_SLOWER = Limit("time, transformers'", "ratio", lambda found: found.seconds[SDPA] / found.seconds[OURS], least=1.0)
FASTER = Limit("time, transformers'", "ratio", lambda found: found.seconds[SDPA] / found.seconds[OURS], least=1.3)
READ = Limit("attention, of read bandwidth", "share", lambda found: found.share_of_bandwidth, least=0.80)
CACHE = Limit("cache a token, of the paper's", "share", lambda found: found.cache_share, most=1.0)
LOOP = Limit("time, of a loop", "ratio", lambda found: found.seconds[SDPA] / found.seconds[OURS], least=1.5)
GROUPED = Limit("time, grouped_mm's", "ratio", lambda found: found.seconds[GROUPED_MM] / found.seconds[OURS], least=1.0)
WITH_TIMES = Limit("time, without word times", "ratio", lambda found: found.over(WITHOUT_TIMES), most=1.10)
HALF_MEMORY = Limit("activations, of sdpa's", "share", lambda found: found.memory_share(SDPA), most=0.50)
THIRD_MEMORY = Limit("activations, of naive", "share", lambda found: found.memory_share(NAIVE), most=1 / 3)
NO_ENCODER = Limit("encoder calls", "calls", lambda found: found.encoder_calls, most=0.0)
TEXT_AND_ATTENTION = Limit("time, of text + attention", "ratio", Found.over_text, most=1.10)
AS_ONE_IMAGE = Limit("time, of one image", "ratio", lambda found: found.over(ONE_IMAGE), most=1.10)
"""Not at least 0.90 too: in layers that attend to whole frames a video has fewer visible pairs than one image."""
