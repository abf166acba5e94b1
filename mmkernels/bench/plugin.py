"""The pytest plugin of ``mmkernels bench``: chooses the rows, and shows and saves each as it finishes."""

from __future__ import annotations

import datetime
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from mmkernels.bench import tables
from mmkernels.bench.rows import select
from mmkernels.meters import quick_collections
from mmkernels.options import BadInput
from mmkernels.report import ProgressBar, progress_bar, write_json


class RowsPlugin:
    """Registered by `run_bench` with a pytest that runs bench files in this process.

    Args:
        wanted: the filter, see `rows.select`.
        out: folder of the result files; the rows of ``bench_<op>.py`` go to ``<op>.json``.

    Attributes:
        bad_filter: why the filter selects nothing, or None.
        results: the files that were written.
        interrupted: by Ctrl-C.
    """

    def __init__(self, wanted: str, out: Path) -> None:
        self._wanted, self._out = wanted, out
        self._reports: dict[Path, dict[str, Any]] = {}
        self._bar: ProgressBar | None = None
        self._machine: dict[str, Any] | None = None
        self.bad_filter: BadInput | None = None
        self.interrupted = False

    @property
    def results(self) -> list[Path]:
        return [path for path in self._reports if path.exists()]

    # The rows.

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        try:
            selected = select([_name(item) for item in items], self._wanted)
        except BadInput as error:
            self.bad_filter, selected = error, [False] * len(items)
        items[:] = [item for item, keep in zip(items, selected, strict=True) if keep]
        for path in map(self._result_of, items):
            report = self._reports.setdefault(path, {"benchmarks": [], "expected_rows": 0})
            report["expected_rows"] += 1
            path.unlink(missing_ok=True)

    def _result_of(self, item: pytest.Item) -> Path:
        return self._out / f"{item.path.stem.removeprefix('bench_')}.json"

    # Progress.

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, bool, bool]:
        # The stream is duplicated, as pytest captures it while a row runs.
        with (
            os.fdopen(os.dup(2), "w") as stream,
            progress_bar(len(session.items), stream) as self._bar,
            quick_collections(),
        ):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        assert self._bar is not None
        self._bar(f"{self._result_of(item).stem}: {_name(item)}")
        return (yield)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """Leaves out the dots, which the bar replaces."""
        return (report.outcome if report.when == "call" or not report.passed else "", "", "")

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.interrupted = excinfo.type is KeyboardInterrupt  # pytest derives other interruptions from it
        # An interrupt may come at an instruction without a line, of which pytest's report would fail.
        excinfo.traceback = type(excinfo.traceback)(x for x in excinfo.traceback if x._rawentry.tb_lineno is not None)

    # Results.

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        assert self._bar is not None
        if report.failed:
            self._bar.result(f"FAILED: {call.excinfo.exconly() if call.excinfo else ''}")
        elif report.when == "call" and report.passed and (measured := _measured(item)) is not None:
            stats = measured.as_dict(include_data=True)
            stats["params"] = {"row": _name(item)}
            self._bar.result(tables.line(stats["extra_info"]))
            self._save(self._result_of(item), stats, item.config)
        return report

    def _save(self, path: Path, stats: dict[str, Any], config: pytest.Config) -> None:
        report = self._reports[path]
        report["benchmarks"].append(stats)
        report["datetime"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
        write_json(path, self._origin(config) | report)

    def _origin(self, config: pytest.Config) -> dict[str, Any]:
        """Returns the machine and the commit as pytest-benchmark would write them."""
        if self._machine is None:
            machine: dict[str, Any] = {}
            config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine)
            commit: dict[str, Any] = config.hook.pytest_benchmark_generate_commit_info(config=config)
            config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
            self._machine = {"machine_info": machine, "commit_info": commit}
        return self._machine


def _measured(item: pytest.Item) -> Any:
    """Returns pytest-benchmark's statistics of a row; None: another plugin has left the row out."""
    return getattr(item.funcargs.get("benchmark"), "stats", None)  # type: ignore[attr-defined]


def _name(item: pytest.Item) -> str:
    return str(item.callspec.params["row"])  # type: ignore[attr-defined]
