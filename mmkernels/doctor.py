"""``mmkernels doctor``: versions, devices, and for each op and backend ready or the reason why not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmkernels import machine
from mmkernels.meters import memory_why_not
from mmkernels.profiling.table import console
from mmkernels.runtime import cpu, host
from mmkernels.runtime.dispatch import BACKENDS, TABLES

READY, NOTHING = "ready", "-"


def states() -> dict[str, dict[str, str]]:
    """For each op boundary and backend: `READY`, why no call can run there, or `NOTHING`: it has no kernel."""
    found = {}
    for op, entries in TABLES.items():
        reasons = {entry.name: entry.why_not() for entry in entries}
        found[op] = {name: (reasons[name] or READY) if name in reasons else NOTHING for name in BACKENDS}
    return found


def print_doctor() -> None:
    """Print everything on standard output."""
    console().print(Group(_facts(), Text(), *_backends()))


def _facts() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _lines():
        table.add_row(name, value)
    return table


def _lines() -> Iterator[tuple[str, str]]:
    for package, version in machine.versions().items():
        yield package, version or "not installed"
    commit = machine.commit()
    if commit:
        yield "commit", commit
    about = machine.describe_machine()
    caches = ", ".join(f"{name.upper()} {_size(size)}" for name, size in about["caches_bytes"].items() if size)
    yield "cpu", f"{machine.device_name()}, {about['isa']}, {about['torch_threads']} threads"
    yield "memory", f"{_size(about['memory_bytes'])}; caches {caches or 'unknown'}"
    gpus = [f"cuda:{i} {machine.describe_gpu(f'cuda:{i}')['name']}" for i in range(torch.cuda.device_count())]
    yield "gpu", ", ".join(gpus) or ("none" if torch.version.cuda else "none: this torch is built without CUDA")
    yield "host extension", host.why_not or f"ready, built with {host.compiler()}"
    yield "CPU kernels", cpu.why_not() or f"ready, for {cpu.isas()[0]}"
    yield "memory meter", memory_why_not() or "ready"


def _backends() -> list[RenderableType]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op")
    for backend in BACKENDS:
        table.add_column(backend, justify="center")
    notes: dict[str, int] = {}
    for op, row in sorted(states().items()):
        table.add_row(op, *(_mark(state, backend, notes) for backend, state in row.items()))
    lines = [f"{READY}: can run here    {NOTHING}: no kernel for this op yet"]
    lines += [f"[{number}] {note}" for note, number in notes.items()]
    return [table, Text("\n".join(lines))]


def _mark(state: str, backend: str, notes: dict[str, int]) -> Text:
    if state == READY:
        return Text(READY, style="green")
    if state == NOTHING:
        return Text(NOTHING, style="dim")
    return Text(f"no [{notes.setdefault(f'{backend}: {state}', len(notes) + 1)}]", style="yellow")


def _size(size: int) -> str:
    """Bytes for people, in binary units."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"
