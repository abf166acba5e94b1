"""Time and memory as measured, shared by the profiler and the benchmarks."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmkernels.runtime import cpu

Run = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PROBE = 2**24  # bytes, to see whether the kernel's figures make sense
_FLUSH = 2**28  # bytes, several times any GPU's L2 cache
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL, _LARGE = 2**16, 2**25  # bytes
_IS_MMAPPED = 2  # a flag in the size that stands before a block


@dataclass(frozen=True)
class Timing:
    """Wall time of one call, in seconds, in the order of the measurement."""

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, as a share of the median; 0 for one sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.seconds

    def per(self, calls: int) -> Timing:
        """Returns the time of one call, where each sample is that of `calls` calls."""
        return Timing(tuple(sample / calls for sample in self.samples))


def time_alternating(
    candidates: Mapping[Name, Run],
    *,
    before: Mapping[Name, Run] | None = None,
    budget: float = 1.0,
    least: int = 3,
    most: int = 100,
    limit: float = float("inf"),
    warm: bool = False,
    device: torch.device | str = "cpu",
) -> dict[Name, Timing]:
    """Times several candidates in turns, so that other load of the machine affects all of them alike.

    Each round calls every candidate once, and begins with another one than the round before.

    Args:
        candidates: what to call, by name.
        before: called, untimed, before each call of the candidate of that name.
        budget: seconds for the counted rounds of all candidates together.
        least, most: bounds on the number of rounds, whatever the budget.
        limit: seconds after which one round is enough.
        warm: every candidate has run before; else the first call of each is not counted.
        device: on a CUDA device a call ends when its kernels have.

    Returns:
        A `Timing` for each candidate, with as many samples as there were rounds.
    """
    names = list(candidates)

    def sample(name: Name) -> float:
        if before is not None and name in before:
            before[name]()
        return time_once(candidates[name], device)

    for name in names if not warm else ():
        sample(name)
    samples: dict[Name, list[float]] = {name: [] for name in names}
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
    """Returns the seconds of one call. Its result is freed within the measured time, as it is in a program."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _mean_seconds(run, 1, device)
    finally:
        if collecting:
            gc.enable()


def time_calls(run: Run, calls: int, device: torch.device | str = "cpu") -> float:
    """Returns the mean seconds of one of `calls` calls.

    On a CUDA device it is the device's time, between events around each call. The calls are queued without waiting.
    Before each of them the L2 cache is overwritten, so that inputs come from memory, as they do in a model between
    other layers. Overwriting takes longer than most launches, so launches count only where they take longer still;
    `host_seconds` measures them.
    """
    cuda = torch.device(device).type == "cuda"
    return _mean_seconds(run, calls, device, before=_larger_than_l2(device).zero_ if cuda else None)


def _mean_seconds(run: Run, calls: int, device: torch.device | str, before: Run | None = None) -> float:
    """Returns the mean seconds of a call; on a CUDA device `before`, which is not timed, runs before each."""
    if torch.device(device).type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize(device)
    for first, last in events:
        if before is not None:
            before()
        first.record()
        run()
        last.record()
    torch.cuda.synchronize(device)
    return sum(float(first.elapsed_time(last)) for first, last in events) / 1e3 / calls


@cache
def _larger_than_l2(device: torch.device | str) -> torch.Tensor:
    return torch.empty(_FLUSH, dtype=torch.int8, device=device)


def host_seconds(run: Run, device: torch.device | str = "cpu", *, calls: int = 100, rounds: int = 11) -> Timing:
    """Returns how long one call occupies the calling thread, by round of `calls` calls without synchronisation.

    So few launches never fill a CUDA device's queue, so that none has to wait. On a CPU it is the call itself.
    """
    samples = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - begin) / calls)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    return Timing(tuple(samples[1:]))


_quick = False  # whether a block of `quick_collections` is entered


@contextmanager
def quick_collections() -> Iterator[None]:
    """Inside, garbage collections pass over what exists now, so that each takes milliseconds, not half a second.

    Each measurement of memory begins with a collection, and most objects of a process are those of its modules. Within
    another one it leaves to that one what collections pass over.
    """
    global _quick
    if _quick:
        yield
        return
    gc.collect()
    gc.freeze()
    _quick = True
    try:
        yield
    finally:
        _quick = False
        gc.unfreeze()


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int | None:
    """Returns the bytes that `run` needs at its peak above what the process held before; None: can't be measured here.

    On a CPU the kernel tells the resident memory of the whole process, so scratch memory of native code counts; the
    resolution is about 0.1 MB. On a CUDA device PyTorch's allocator tells it. Call `run` once before, so that one-time
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
        cpu.release()  # memory that a call before has kept would not be counted
        _CLEAR_REFS.write_text("5")  # sets the high-water mark back to what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)


@cache
def memory_why_not(device: torch.device | str = "cpu") -> str | None:
    """Returns why `peak_memory` can't measure on this device, or None."""
    kind = torch.device(device).type
    if kind == "cuda":
        return None
    if kind != "cpu":
        return f"peak memory can't be measured on {kind}"
    needs = f"peak memory can't be measured here: it needs Linux with a writable {_CLEAR_REFS}"
    try:
        measured = _host_peak(lambda: bytearray(b"\1") * _PROBE)
    except (OSError, KeyError) as error:
        return f"{needs} ({error})"
    return None if abs(measured - _PROBE) < _PROBE / 4 else f"{needs} that resets VmHWM"


def _status(field: str) -> int:
    """Returns the bytes of a line such as ``VmRSS:  1234 kB`` in /proc/self/status."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


# Resident memory that means the memory in use, where the C library is glibc. glibc keeps most of what a program frees,
# and reuses it badly: before 2.38 an aligned block, as every tensor is, seldom fits where an equal one was freed. Four
# tensors of 20 MB, each freed before the next, may take 60 MB.


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, every block of 64 KiB and more comes fresh from the kernel, and returns to it as soon as it is freed.

    First, memory that is already free returns to the kernel. Its addresses in the heap are filled with blocks that are
    never touched, which take no memory, so that none is used again. Afterwards blocks of up to 32 MiB are kept for
    reuse, which is glibc's own rule after a block of that size was freed. Without glibc this does nothing.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
    libc.malloc_trim(0)
    fillers = _fill_holes(libc)
    try:
        yield
    finally:
        for filler in fillers:
            libc.free(filler)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def _fill_holes(libc: ctypes.CDLL) -> list[int]:
    fillers = []
    size = _LARGE
    while size >= _SMALL:
        block = libc.malloc(size)
        if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED:
            libc.free(block)  # there is no hole of this size any more
            size //= 2
        else:
            fillers.append(block)
    return fillers


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc
