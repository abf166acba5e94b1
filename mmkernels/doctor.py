"""``mmkernels doctor``: versions, devices, and for each op and backend ready or the reason why not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from mmkernels import machine, report
from mmkernels.meters import memory_why_not
from mmkernels.report import Footnotes, binary_size, plural
from mmkernels.runtime import cpu, host
from mmkernels.runtime.dispatch import BACKENDS, TABLES

READY, NOTHING = "ready", "-"


def states() -> dict[str, dict[str, str]]:
    """Returns for each op boundary and backend `READY`, why no call can run there, or `NOTHING`: it has no kernel."""
    table = {}
    for op, entries in TABLES.items():
        reasons = {entry.name: entry.why_not() for entry in entries}
        table[op] = {name: (reasons[name] or READY) if name in reasons else NOTHING for name in BACKENDS}
    return table


def print_doctor() -> None:
    """Prints everything on standard output."""
    report.console().print(Group(_facts(), Text(), *_backends()))


def _facts() -> Table:
    facts = Table(Column(style="bold"), Column(), box=None, show_header=False, pad_edge=False)
    for name, value in _lines():
        facts.add_row(name, value)
    return facts


def _lines() -> Iterator[tuple[str, str]]:
    for package, version in machine.versions().items():
        yield package, version or "not installed"
    commit = machine.commit()
    if commit:
        yield "commit", commit
    about = machine.describe_machine()
    caches = ", ".join(f"{name.upper()} {binary_size(size)}" for name, size in about["caches_bytes"].items() if size)
    yield "cpu", f"{machine.device_name()}, {about['isa']}, {plural(about['torch_threads'], 'thread')}"
    yield "memory", f"{binary_size(about['memory_bytes'])}; caches {caches or 'unknown'}"
    gpus = [f"cuda:{i} {machine.describe_gpu(f'cuda:{i}')['name']}" for i in range(torch.cuda.device_count())]
    yield "gpu", ", ".join(gpus) or ("none" if torch.version.cuda else "none: this torch is built without CUDA")
    yield "host extension", host.why_not or f"ready, built with {host.compiler()}"
    yield "CPU kernels", cpu.why_not() or f"ready, for {cpu.isas()[0]}"
    yield "memory meter", memory_why_not() or "ready"


def _backends() -> list[RenderableType]:
    notes = Footnotes()
    rows = [
        [op, *(_mark(state, backend, notes) for backend, state in row.items())] for op, row in sorted(states().items())
    ]
    columns = [Column("op"), *(Column(backend, justify="center") for backend in BACKENDS)]
    legend = f"{READY}: can run here    {NOTHING}: no kernel for this op yet"
    return [report.table(rows, columns), Text("\n".join([legend, *notes.lines()]))]


def _mark(state: str, backend: str, notes: Footnotes) -> Text:
    if state == READY:
        return Text(READY, style="green")
    if state == NOTHING:
        return Text(NOTHING, style="dim")
    return Text(f"no {notes.mark(f'{backend}: {state}')}", style="yellow")
