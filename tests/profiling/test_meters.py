"""The meters measure what is known beforehand. No test depends on how long anything takes."""

import gc
import math
from pathlib import Path

import pytest
import torch

from mmkernels import meters
from mmkernels.meters import Timing, memory_why_not, peak_memory, quick_collections, time_alternating

MEASURES = pytest.mark.skipif(memory_why_not() is not None, reason=str(memory_why_not()))


@MEASURES
@pytest.mark.parametrize("megabytes", [16, 100])
def test_peak_memory_of_a_known_allocation(megabytes: int) -> None:
    def run() -> None:
        torch.ones(megabytes * 10**6 // 4)

    assert peak_memory(run) == pytest.approx(megabytes * 10**6, rel=0.1)


@MEASURES
def test_peak_memory_is_the_worst_moment_not_the_sum() -> None:
    def run() -> None:
        for _ in range(4):
            torch.ones(5 * 10**6)  # 20 MB, freed before the next

    assert peak_memory(run) == pytest.approx(20e6, rel=0.1)


@MEASURES
def test_memory_held_before_does_not_count_and_memory_freed_before_is_not_reused_unseen() -> None:
    held = torch.ones(10**7)
    for _ in range(2):
        torch.ones(10**7)  # freed at once: the heap might keep its pages
    assert peak_memory(lambda: torch.ones(5 * 10**6)) == pytest.approx(20e6, rel=0.1)
    assert held.sum() == 10**7


@MEASURES
def test_nothing_needs_no_memory() -> None:
    assert peak_memory(lambda: None) < 10**6


def test_memory_that_cannot_be_measured_is_none_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    memory_why_not.cache_clear()
    try:
        assert "can't be measured" in memory_why_not()
        assert peak_memory(lambda: None) is None
    finally:
        memory_why_not.cache_clear()


def test_a_counter_that_does_not_reset_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "clear_refs")  # takes what is written, and does nothing
    kept = bytearray(b"\1") * 2**26
    del kept  # the process' highest mark now lies 64 MiB above what it holds
    memory_why_not.cache_clear()
    try:
        assert "resets VmHWM" in memory_why_not()
    finally:
        memory_why_not.cache_clear()


def test_quick_collections_within_others_leave_them_as_they_are() -> None:
    with quick_collections():
        frozen = gc.get_freeze_count()
        with quick_collections():
            assert frozen > 0 and gc.get_freeze_count() == frozen
        assert gc.get_freeze_count() == frozen


def test_candidates_take_turns_and_each_goes_first_in_its_turn() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = time_alternating(candidates, budget=0.0, least=4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # a warm-up, then four rounds
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}


def test_candidates_that_are_warm_are_counted_from_the_first_call() -> None:
    calls: list[str] = []
    time_alternating({"a": lambda: calls.append("a")}, budget=0.0, least=2, warm=True)
    assert len(calls) == 2


def test_rounds_end_at_the_most_or_with_the_budget() -> None:
    assert len(time_alternating({"a": lambda: None}, budget=math.inf, most=7)["a"].samples) == 7
    assert len(time_alternating({"a": lambda: None}, budget=-1.0, least=2)["a"].samples) == 2
    assert len(time_alternating({"a": lambda: None}, budget=-1.0, least=5, limit=-1.0)["a"].samples) == 1


def test_before_runs_before_every_call_of_its_candidate() -> None:
    calls: list[str] = []
    time_alternating({"a": lambda: calls.append("a")}, before={"a": lambda: calls.append("<")}, budget=0.0, least=2)
    assert "".join(calls) == "<a<a<a"


def test_statistics() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.seconds == 3.0
    assert timing.spread == pytest.approx(1 / 3)  # quartiles 2 and 4
    assert timing.per(2) == Timing((2.0, 0.5, 1.0, 1.5, 50.0))
    assert Timing((5.0,)).spread == 0.0
