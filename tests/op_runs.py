"""How often the tests run each op, and how long they take; the budget that keeps ``make test`` short.

A plugin of pytest, which conftest.py registers. It counts in the process that runs a test; a report carries the count
to the process that sums up, which with ``-n`` is another.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import BUDGET, DEFAULT
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

_counts: Counter[str] = Counter()
_PROPERTY = "op runs"


@contextmanager
def one_run(op: str) -> Iterator[None]:
    """Count a run, where the block has none that goes through the op's table of backends."""
    before = _counts[op]
    yield
    _counts[op] = max(_counts[op], before + 1)


class OpRuns:
    """Counts, and at the end of the session writes and judges them.

    Args:
        times: the JSON file to write, or None.
        interpreted: whether Triton's kernels run in their interpreter, which has a budget of its own.
        judged: whether an op above its budget fails the session.
    """

    def __init__(self, times: Path | None, *, interpreted: bool, judged: bool) -> None:
        self.times, self.interpreted, self.judged = times, interpreted, judged
        self.begin = time.perf_counter()
        self.installed = False
        self.runs: Counter[str] = Counter()
        self.runs_of: dict[str, Counter[str]] = defaultdict(Counter)  # op -> test function -> runs
        self.seconds: Counter[str] = Counter()  # by test
        self.shares: dict[str, dict[str, int]] = {}  # test -> op -> runs

    # In the process that runs tests.

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        if not self.installed:
            self.installed = True
            _install()
        _counts.clear()
        try:
            return (yield)
        finally:
            item.user_properties.append((_PROPERTY, dict(_counts)))

    # In the process that reports.

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call":
            found = dict(report.user_properties).get(_PROPERTY, {})
            self.shares[report.nodeid] = found
            for op, runs in found.items():
                self.runs[op] += runs
                self.runs_of[op][report.nodeid.partition("[")[0]] += runs

    def over_budget(self) -> list[str]:
        """Returns a line for each op that the tests run too often."""
        lines = []
        for op, runs in sorted(self.runs.items()):
            budget = BUDGET.get(op, DEFAULT)
            most = budget.interpreted if self.interpreted else budget.native
            if runs > most:
                worst = ", ".join(f"{test} {n}" for test, n in self.runs_of[op].most_common(3))
                kind = "interpreted runs" if self.interpreted else "runs"
                lines.append(f"{op}: {runs} {kind}, {runs - most} above tests/budget.py's {most}; most in {worst}")
        return lines

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        if self.judged and self.over_budget() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.times is not None:
            self.times.parent.mkdir(parents=True, exist_ok=True)
            self.times.write_text(json.dumps(self.summary(), indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.judged and (lines := self.over_budget()):
            terminalreporter.section("ops above their budget of runs", red=True)
            for line in lines:
                terminalreporter.write_line(line)

    def summary(self) -> dict[str, Any]:
        """Returns seconds and tests of each file; of each op its runs, and the tests' seconds in proportion to them.

        Beside these the functions that run an op most often: where a budget can be saved.
        """
        files: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "tests": 0})
        ops: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "tests": 0, "runs": 0})
        for test, seconds in self.seconds.items():
            file = files[test.partition("::")[0]]
            file["seconds"] += seconds
            file["tests"] += 1
            shares = self.shares.get(test, {})
            for op, runs in shares.items():
                ops[op]["runs"] += runs
                ops[op]["tests"] += 1
                ops[op]["seconds"] += seconds * runs / sum(shares.values())
        for op, functions in self.runs_of.items():
            ops[op]["most runs"] = dict(functions.most_common(15))

        def sort(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
            rows = sorted(table.items(), key=lambda row: -row[1]["seconds"])
            return {name: row | {"seconds": round(row["seconds"], 2)} for name, row in rows}

        slowest = {test: round(seconds, 2) for test, seconds in self.seconds.most_common(30)}
        return {
            "wall_seconds": round(time.perf_counter() - self.begin, 1),
            "test_seconds": round(sum(self.seconds.values()), 1),
            "tests": len(self.seconds),
            "ops": sort(ops),
            "files": sort(files),
            "slowest": slowest,
        }


def watch_storage() -> None:
    """Let every backend of every boundary check that what it returns is memory of its own; see `shared_storage`."""
    from mmkernels.runtime.dispatch import TABLES

    for op, table in TABLES.items():
        TABLES[op] = tuple(replace(entry, run=_own_storage(f"{op}, {entry.name}", entry.run)) for entry in table)


def _install() -> None:
    """Let every backend of every op count its runs; backward passes belong to the run that they end."""
    from mmkernels.ops import NAMES
    from mmkernels.runtime.dispatch import TABLES

    watch_storage()
    for op in NAMES:
        TABLES[op] = tuple(replace(entry, run=_counted(op, entry.run)) for entry in TABLES[op])


def _counted(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        _counts[op] += 1
        return run(*args, **kwargs)

    return counted


def _own_storage(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def checked(inputs: Any) -> Any:
        outputs = run(inputs)
        if not torch.compiler.is_compiling():  # a formula that is traced: its tensors have no memory
            assert not (shared := shared_storage(inputs, outputs)), f"{name}: {shared}"
        return outputs

    return checked


def shared_storage(inputs: Sequence[Any], outputs: Tensor | Sequence[Tensor]) -> str:
    """Returns which tensors share memory that an op must not share, or "".

    PyTorch refuses an output that is a view of an input or of another output, in a graph and only on some machines.
    """
    owner = {_storage(x): "an input" for x in inputs if isinstance(x, Tensor)}
    for place, output in enumerate([outputs] if isinstance(outputs, Tensor) else outputs):
        if owner.setdefault(_storage(output), name := f"output {place}") != name:
            return f"{name} lies in the memory of {owner[_storage(output)]}"
    return ""


def _storage(x: Tensor) -> int | object:
    """Returns which memory a tensor has, if only none; of one that torch.func wraps, a new object."""
    return object() if is_functorch_wrapped_tensor(x) else x.untyped_storage()._cdata
