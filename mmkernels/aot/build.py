"""Compiles what the plans ask for, several kernels at a time; what was compiled before is read from the cache."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from mmkernels.aot import cache, triton
from mmkernels.aot.launches import Entry
from mmkernels.aot.resources import Row, Usage

_PROCESSES = 2


def compile_entries(wanted: Sequence[Entry]) -> tuple[list[Row], int]:
    """Returns a row for each entry, and how many kernels had to be compiled.

    Raises:
        RuntimeError: a kernel does not compile; names it.
    """
    usages, compiled = _for_each(wanted, _compile, "")
    return [
        Row(entry.op, entry.job.kernel, entry.variant, entry.job.target, Usage(*usage))
        for entry, usage in zip(wanted, usages, strict=True)
    ], compiled


def translate_entries(wanted: Sequence[Entry]) -> int:
    """Run Triton's front end, and return how many kernels were not known to pass it.

    Raises:
        RuntimeError: a kernel is refused; names it.
    """
    return _for_each(wanted, _translate, "-frontend")[1]


def _for_each(wanted: Sequence[Entry], work: Callable[[Entry], Any], suffix: str) -> tuple[list[Any], int]:
    results = {entry.job.key: cache.read(entry.job.key + suffix) for entry in wanted}
    missing = list({entry.job.key: entry for entry in wanted if results[entry.job.key] is None}.values())
    if missing:
        # Spawned, because a fork would inherit PyTorch's threads. Ctrl-C, which all of them get, is for this process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(_PROCESSES, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            for entry, result in zip(missing, pool.map(work, missing), strict=True):
                results[entry.job.key] = result
                cache.write(entry.job.key + suffix, result)
    return [results[entry.job.key] for entry in wanted], len(missing)


def _compile(entry: Entry) -> Usage:
    return _named(entry, triton.measure, "does not compile")


def _translate(entry: Entry) -> bool:
    _named(entry, triton.translate, "is refused")
    return True


def _named(entry: Entry, work: Callable[[triton.Job], Any], what: str) -> Any:
    try:
        return work(entry.job)
    except Exception as error:  # of the compiler's own kinds, some of which can't be passed on to another process
        raise RuntimeError(f"{entry.name} {what}: {error}") from None
