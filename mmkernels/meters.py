"""Time and memory as measured, shared by the profiler and the benchmarks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmkernels.heap import freed_at_once
from mmkernels.runtime import cpu

Run = Callable[[], Any]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PROBE = 2**24  # bytes, to see whether the kernel's answers make sense
_FLUSH = 2**28  # bytes, several times any GPU's L2 cache


@dataclass(frozen=True)
class Timing:
    """Wall time of one call, in seconds, in the order in which the samples were taken."""

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 for one sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.seconds

    def per(self, calls: int) -> Timing:
        """The same samples where one sample held `calls` calls."""
        return Timing(tuple(sample / calls for sample in self.samples))


def time_alternating(
    candidates: Mapping[str, Run],
    *,
    before: Mapping[str, Run] | None = None,
    budget: float = 1.0,
    least: int = 3,
    most: int = 100,
    limit: float = float("inf"),
    warm: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several candidates in turns, so that whatever else the machine does hits all of them alike.

    Each round calls every candidate once, beginning with another one each time.

    Args:
        candidates: what to call, by name.
        before: called, untimed, before each call of the candidate of that name.
        budget: seconds for the counted rounds of all candidates together.
        least, most: bounds on the number of rounds, whatever the budget.
        limit: seconds after which one round is enough.
        warm: every candidate has run before; else the first call of each is not counted.
        device: on a CUDA device a call ends when its kernels have.

    Returns:
        a `Timing` for each candidate, with as many samples as there were rounds.
    """
    names = list(candidates)

    def sample(name: str) -> float:
        if before is not None and name in before:
            before[name]()
        return time_once(candidates[name], device)

    for name in names if not warm else ():
        sample(name)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for round_ in range(most):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(sample(name))
        spent = time.perf_counter() - begin
        allowed = budget if round_ + 1 >= least else limit
        if spent + spent / (round_ + 1) > allowed:
            break
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def time_once(run: Run, device: torch.device | str = "cpu") -> float:
    """Seconds of one call. Its result is dropped within the measured time, as a program's would be."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        if torch.device(device).type != "cuda":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize(device)
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize(device)
        return float(events[0].elapsed_time(events[1])) / 1e3
    finally:
        if collecting:
            gc.enable()


def time_calls(run: Run, calls: int, device: torch.device | str = "cpu") -> float:
    """Mean seconds of one of `calls` calls.

    On a CUDA device it is the device's time, between events around each call; the calls are queued without waiting, and
    before each the L2 cache is overwritten, so that inputs come from memory as they do in a model between other layers.
    Overwriting takes longer than launching most calls, so the launches themselves are seen only where they take longer
    still; `host_seconds` measures them.
    """
    if torch.device(device).type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls
    overwrite = _larger_than_l2(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin_event, end_event in events:
        overwrite.zero_()
        begin_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return sum(float(first.elapsed_time(last)) for first, last in events) / 1e3 / calls


@cache
def _larger_than_l2(device: torch.device | str) -> torch.Tensor:
    return torch.empty(_FLUSH, dtype=torch.int8, device=device)


def host_seconds(run: Run, device: torch.device | str = "cpu", *, calls: int = 100, rounds: int = 11) -> Timing:
    """What one call takes of the calling thread, by round of `calls` calls that nothing waits for.

    So few launches never fill a CUDA device's queue, where a launch would wait. On a CPU it is the call itself.
    """
    samples = []
    for _ in range(rounds + 1):
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - begin) / calls)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return Timing(tuple(samples[1:]))


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int | None:
    """Bytes that `run` needs at its worst moment beyond what the process held before it; None: can't be measured here.

    On a CPU the resident memory of the whole process is read from the kernel, so scratch memory of native code counts;
    its grain is about 0.1 MB. On a CUDA device PyTorch's allocator tells it. Call `run` once before, so that one-time
    costs (thread pools, compiled code) are not counted.
    """
    if memory_why_not(device) is not None:
        return None
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _host_peak(run)


def _host_peak(run: Run) -> int:
    with freed_at_once():
        cpu.release()  # what a call before has left would not be counted
        _CLEAR_REFS.write_text("5")  # sets the high-water mark back to what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)


@cache
def memory_why_not(device: torch.device | str = "cpu") -> str | None:
    """Why `peak_memory` can't measure on this device, or None."""
    kind = torch.device(device).type
    if kind == "cuda":
        return None
    if kind != "cpu":
        return f"peak memory can't be measured on {kind}"
    needs = f"peak memory can't be measured here: it needs Linux with a writable {_CLEAR_REFS}"
    try:
        found = _host_peak(lambda: bytearray(b"\1") * _PROBE)
    except (OSError, KeyError) as error:
        return f"{needs} ({error})"
    return None if abs(found - _PROBE) < _PROBE / 4 else f"{needs} that resets VmHWM"


def _status(field: str) -> int:
    """Bytes of a line such as ``VmRSS:  1234 kB`` in /proc/self/status."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
