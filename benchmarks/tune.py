"""Searches the tile sizes of an op's Triton kernels on the GPU at hand, and writes them to the op's ``tuned.json``.

python benchmarks/tune.py OP [--kernels forward,decode] [--dtypes bf16] [--dims 64,128] [--seconds 540]

(With ``PYTHONPATH=.`` before it, where mmkernels is not installed.)

For each kernel, dtype and dim, the configurations of the op's plan that can fit are compiled, checked against the op's
definition in float64 and timed by ``triton.testing.do_bench``; those that do not compile are counted. The fastest few
and the default are then timed again in turns, and the winner's row is written: the default's own where nothing is
faster by 2 %. Rows of other kernels, dtypes, dims and GPUs stay.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmkernels import ops
from mmkernels.bench.gate import Call, Gate, draw_cotangents, draw_inputs, flat
from mmkernels.interrupts import ends_well
from mmkernels.machine import versions
from mmkernels.options import DTYPES, parse_list
from mmkernels.plan import SHARED_BYTES, Config, Problem
from mmkernels.runtime import tuning

Clock = Callable[[Call], float]  # milliseconds of a call

_MARGIN = 0.98  # of the default's time, that a configuration must undercut: less is noise
_FINALISTS, _ROUNDS = 3, 9
_REGISTERS = 255  # that a thread can have on NVIDIA GPUs, whose scores lie in registers before sm_100
_SIZES = ("block_q", "block_k", "warps", "stages")


def bench(call: Call) -> float:
    """Returns the milliseconds that a call takes of the GPU."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


class WrongResult(Exception):
    """A configuration compiles and computes something else."""


class Timed:
    """A problem on the device, and the call to time."""

    def __init__(self, op: str, problem: Problem, dtype: torch.dtype, dim: int, device: torch.device, backend: str):
        self.spec, self.grads = ops.specs()[op], problem.grads
        self.inputs = draw_inputs(self.spec, lambda g: problem.make(g, dim), dtype, device, problem.grads)
        forward: Call = partial(self.spec.function, **self.inputs, backend=backend)
        self.call, self.outputs, self.cotangents = forward, [], []
        if problem.grads:
            out = forward()
            self.outputs, self.cotangents = flat(out), draw_cotangents(flat(out))
            leaves = [self.inputs[name] for name in problem.grads]
            if problem.whole:
                self.call = lambda: torch.autograd.grad(forward(), leaves, self.cotangents)
            else:
                self.call = lambda: torch.autograd.grad(out, leaves, self.cotangents, retain_graph=True)

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.spec, self.inputs, self.grads, self.cotangents)

    def check(self) -> None:
        """Raises `WrongResult` where the call's results are outside the op's error budget."""
        problem = self.gate.problem([*self.outputs, *flat(self.call())])
        if problem is not None:
            raise WrongResult(problem)


class Tuner:
    """The search for one kernel, dtype and dim.

    Args:
        clock: returns the milliseconds of a call.
        backend: whose kernels are timed.
    """

    def __init__(self, op: str, kernel: str, dtype: str, dim: int, device: torch.device, *, clock: Clock = bench,
                 backend: str = "triton") -> None:  # fmt: skip
        plan = tuning.plan(op)
        assert plan is not None
        self.op, self.kernel, self.dtype, self.dim, self.device = op, kernel, dtype, dim, device
        self.search, self.clock = plan.searches[kernel], clock
        self.default = tuning.default(op, kernel, tuning.architecture(device), DTYPES[dtype], dim)
        self._prepare = partial(Timed, op, dtype=DTYPES[dtype], dim=dim, device=device, backend=backend)
        self.timed = [self._prepare(problem) for problem in self.search.problems]
        self.failures: Counter[str] = Counter()
        self.left_out = 0

    @cached_property
    def heaviest(self) -> Timed:
        return self._prepare(replace(self.search.heaviest, whole=True))

    def candidates(self) -> list[Config]:
        """Returns the default, then what the plan names and the GPU may hold."""
        search = self.search
        sizes = itertools.product(search.rows, search.columns, search.warps, search.stages)
        return list(dict.fromkeys([self.default, *filter(self._may_fit, itertools.starmap(Config, sizes))]))

    def _may_fit(self, config: Config) -> bool:
        architecture = tuning.architecture(self.device)
        scores = config.block_q * config.block_k  # in float32, of which a thread has a share
        in_registers = architecture in ("sm_80", "sm_89", "sm_90")
        if in_registers and scores > _REGISTERS * 32 * config.warps:
            return False
        shared = self.search.least_shared(config, self.dim, DTYPES[self.dtype].itemsize)
        return shared <= SHARED_BYTES[architecture]

    def compile(self, candidates: Sequence[Config]) -> None:
        """Run each once, whether it works or not: its code is then in Triton's cache on disk."""
        for config in candidates:
            self._try(config, lambda: [timed.call() for timed in self.timed])

    def run(self, end: float) -> dict[str, Any] | None:
        """Returns the row to write; None: not even the default works.

        Args:
            end: by `time.monotonic`, after which no further configuration is tried.
        """
        measured: dict[Config, list[float]] = {}
        for config in self.candidates():
            if measured and time.monotonic() > end:
                self.left_out += 1
                continue
            milliseconds = self._try(config, self._check_and_time)
            if milliseconds is not None:
                measured[config] = milliseconds
        if self.default not in measured:
            return None
        ranked = sorted(measured, key=lambda config: _score(measured[config], measured[self.default]))
        others = (config for config in ranked if config != self.default)
        runnable = (config for config in others if self._try(config, self.heaviest.call) is not None)
        finalists = [self.default, *itertools.islice(runnable, _FINALISTS)]
        rounds: dict[Config, list[list[float]]] = {config: [] for config in finalists}
        for _, config in itertools.product(range(_ROUNDS), finalists):
            milliseconds = self._try(config, self._time)
            if milliseconds is not None:
                rounds[config].append(milliseconds)
        medians = {config: list(map(statistics.median, zip(*times))) for config, times in rounds.items() if times}
        base = medians[self.default]
        best = min(medians, key=lambda config: _score(medians[config], base))
        if _score(medians[best], base) > _MARGIN:
            best = self.default
        return self._row(best, medians[best][0], base[0])

    def _try(self, config: Config, work: Callable[[], Any]) -> Any:
        """Returns what `work` returns with `config` in force; None, and a failure noted, where it raises."""
        try:
            with tuning.use_config(self.op, self.kernel, config):
                return work()
        except Exception as error:  # out of registers or shared memory, a shape that the compiler refuses
            self.failures[type(error).__name__] += 1
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # raises where an error has broken the GPU's context

    def _check_and_time(self) -> list[float]:
        for timed in self.timed:
            timed.check()
        return self._time()

    def _time(self) -> list[float]:
        return [self.clock(timed.call) for timed in self.timed]

    def _row(self, best: Config, milliseconds: float, default_milliseconds: float) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "kernel": self.kernel,
            "dtype": str(DTYPES[self.dtype]).removeprefix("torch."),
            "dim": tuning.bucket(self.dim),
            **{name: getattr(best, name) for name in _SIZES},
            "milliseconds": round(milliseconds, 4),
            "default_milliseconds": round(default_milliseconds, 4),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "triton": versions()["triton"],
        }

    def describe(self, row: dict[str, Any] | None) -> Iterator[str]:
        """Returns lines about the search for people."""
        name = f"{self.kernel}, {self.dtype}, dim {self.dim}"
        tried = len(self.candidates()) - self.left_out
        failures = ", ".join(f"{count} {kind}" for kind, count in self.failures.items()) or "none failed"
        if row is None:
            yield f"{name}: the default {self.default} does not work; {tried} tried, {failures}"
            return
        sizes = " ".join(f"{key}={row[key]}" for key in _SIZES)
        gain = row["default_milliseconds"] / row["milliseconds"]
        yield f"{name}: {sizes}, {row['milliseconds']} ms, {gain:.2f}x the default's speed; {tried} tried, {failures}"
        if self.left_out:
            yield f"  {self.left_out} left out for time"


def _score(milliseconds: Sequence[float], base: Sequence[float]) -> float:
    """Returns the geometric mean, over the problems, of the time as a share of the default's."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(milliseconds, base, strict=True)))


def write(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file in place of the one with its device, kernel, dtype and dim; the others stay."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if _key(old) != _key(row)] + [row]
    lines = ",\n".join("  " + json.dumps(each) for each in sorted(rows, key=_key))
    unfinished = path.with_name(f".{path.name}.unfinished")  # an interruption leaves the old rows
    unfinished.write_text(f"[\n{lines}\n]\n")
    unfinished.replace(path)


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["device"], row["kernel"], row["dtype"], row["dim"]


def _compile(op: str, kernel: str, dtype: str, dim: int, part: slice) -> None:
    tuner = Tuner(op, kernel, dtype, dim, torch.device("cuda", torch.cuda.current_device()))
    tuner.compile(tuner.candidates()[part])


def compile_beforehand(*of: Any, workers: int) -> None:
    """Fill Triton's cache from several processes: compiling is most of a search, and each does it on one core."""
    pool = ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn"))
    with pool:
        futures: list[Future[None]] = [pool.submit(_compile, *of, slice(n, None, workers)) for n in range(workers)]
        for future in futures:
            future.exception()  # what fails here fails again, and is counted, in the search


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 where not even a default works, or 2 where there is no GPU."""
    plans = {op: plan for op, plan in tuning.plans().items() if plan.searches}
    parser = argparse.ArgumentParser(description="Search the tile sizes of an op's Triton kernels on this GPU.")
    parser.add_argument("op", choices=sorted(plans))
    parser.add_argument("--kernels", default="", help="comma-separated; default: all of the op's")
    parser.add_argument("--dtypes", default="bf16", help="of bf16, fp16, fp32")
    parser.add_argument("--dims", default="64,128,256", help="a row serves all up to the next of 64, 128, 256")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which what is left is left out")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile beforehand; 0: none")
    parser.add_argument("--out", type=Path, help="file to write; default: the op's tuned.json")
    options = parser.parse_args(arguments)
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out must be a file in a folder that exists, got {str(options.out)!r}")
    end = time.monotonic() + options.seconds
    from gpu import gpu_why_not  # beside this file

    reason = gpu_why_not()
    if reason is not None:
        print(f"tune.py: nothing was searched: {reason}", file=sys.stderr)
        return 2
    known = plans[options.op].searches
    kernels = parse_list(options.kernels) or tuple(known)
    for kernel in kernels:
        if kernel not in known:
            parser.error(f"{options.op} has no kernel {kernel!r}; it has {', '.join(known)}")
    path = options.out or ops.folder(options.op) / "tuned.json"
    device = torch.device("cuda", torch.cuda.current_device())
    failed = 0
    for kernel, dtype, dim in itertools.product(
        kernels, parse_list(options.dtypes), map(int, parse_list(options.dims))
    ):
        if time.monotonic() > end:
            print(f"{kernel}, {dtype}, {dim}: left out, the time is up")
            continue
        compile_beforehand(options.op, kernel, dtype, dim, workers=options.workers)
        tuner = Tuner(options.op, kernel, dtype, dim, device)
        row = tuner.run(end)
        if row is not None:
            write(path, row)
        failed += row is None
        print("\n".join(tuner.describe(row)), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    with ends_well("tune.py", "the rows that were found are written"):
        sys.exit(main())
