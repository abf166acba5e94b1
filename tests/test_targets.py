"""What each kind of target takes from a row."""

import dataclasses

import pytest

from mmkernels.report import met
from mmkernels.targets import (
    AtPeakShare,
    BandwidthShare,
    ExtraMemory,
    Measured,
    MemoryRatio,
    Milliseconds,
    PeakOrPeerShare,
    PeakShare,
    Rate,
    Speedup,
    Target,
    YardstickShare,
)

ROW = Measured(
    flops=6e9,
    bytes=1e9,
    seconds={"ours": 2.0, "naive": 8.0},
    memory={"ours": 2e6, "naive": 60e6, "unweighed": None},
    peak_flops=4e9,
    peak_bytes=1e9,
    backward_rate=2e12,
    yardstick_rate=6e9,
)


@pytest.mark.parametrize(
    ("target", "name", "reached", "at_peak"),
    [
        (PeakShare("fp32", True, 0.7), "peak", 0.75, 1.0),
        (BandwidthShare("fp32", True, 0.7), "bandwidth", 0.5, 1.0),
        (AtPeakShare("fp32", True, 0.7, "naive"), "naive at peak", 0.75, 1.0),  # 4x of 5.33x
        (AtPeakShare("fp32", True, 0.7, "missing"), "missing at peak", None, 1.0),
        (Speedup("fp32", True, 5.0, "naive"), "naive", 4.0, 8.0 / 1.5),
        (Speedup("fp32", True, 5.0, "missing"), "missing", None, None),
        (MemoryRatio("fp32", True, 30.0, "naive"), "memory of naive", 30.0, None),
        (MemoryRatio("fp32", True, 30.0, "naive", allowed=1e6), "memory of naive, 1 MB allowed", 60.0, None),
        (MemoryRatio("fp32", True, 30.0, "unweighed"), "memory of unweighed", None, None),
        (MemoryRatio("fp32", True, 30.0, "missing"), "memory of missing", None, None),
        (ExtraMemory("fp32", True, 2.0), "extra MB", 2.0, None),
        (Milliseconds("fp32", True, 2500.0, "a GPU"), "ms, a GPU", 2000.0, 1500.0),
        (Rate("fp32", True, 450.0), "tflops", 2.0, 0.004),
        (YardstickShare("fp32", True, 0.8), "yardstick", 0.5, None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Target) else None,
)
def test_what_is_reached(target: Target, name: str, reached: float | None, at_peak: float | None) -> None:
    judged = target.judge(ROW)
    assert judged["than"] == name and judged["unit"] == target.unit
    assert judged["found"] == (None if reached is None else pytest.approx(reached))
    assert judged["at_peak"] == (None if at_peak is None else pytest.approx(at_peak))
    assert judged["most" if isinstance(target, ExtraMemory | Milliseconds) else "least"] == target.limit
    if reached is not None:
        upper = isinstance(target, ExtraMemory | Milliseconds)
        assert met(judged) == (reached <= target.limit if upper else reached >= target.limit)


@pytest.mark.parametrize(
    ("peer", "than", "least", "found", "at_peak"),
    [
        (1.0, "peak", 0.7, 0.75, 1.0),  # its rate is 6e9 of a peak of 4e9
        (1.5, "peak", 0.7, 0.75, 1.0),  # 80 % of its 4e9 is more than 70 % of the peak
        (2.0, "mm", 0.8, 1.0, 2.0 / 1.5),  # 80 % of its 3e9 is less
        (None, "peak", 0.7, 0.75, 1.0),
    ],
)
def test_a_share_of_the_peak_or_of_a_peer_s_rate(
    peer: float | None, than: str, least: float, found: float, at_peak: float
) -> None:
    """Whichever asks for less."""
    row = dataclasses.replace(ROW, seconds={"ours": 2.0} | ({} if peer is None else {"mm": peer}))
    target = PeakOrPeerShare("fp32", True, 0.7, "mm", of_peer=0.8)
    judged = target.judge(row)
    assert (judged["than"], judged["least"]) == (than, least) and target.reached(row) == 0.75
    assert judged["found"] == pytest.approx(found) and judged["at_peak"] == pytest.approx(at_peak)


def test_a_row_bound_by_memory() -> None:
    row = dataclasses.replace(ROW, bytes=1.9e9)
    assert row.seconds_at_peak == pytest.approx(1.9)
    assert AtPeakShare("fp32", True, 0.7, "naive").reached(row) == pytest.approx(0.95)


def test_a_rate_is_that_of_the_pass_where_the_backward_was_not_timed() -> None:
    row = dataclasses.replace(ROW, backward_rate=None, yardstick_rate=None)
    assert Rate("fp32", True, 450.0).reached(row) == pytest.approx(0.003)
    assert YardstickShare("fp32", True, 0.8).reached(row) is None


def test_memory_that_can_t_be_measured_is_no_result() -> None:
    row = dataclasses.replace(ROW, memory={"ours": None, "naive": None})
    assert ExtraMemory("fp32", True, 2.0).reached(row) is None
    assert MemoryRatio("fp32", True, 2.0, "naive").reached(row) is None
