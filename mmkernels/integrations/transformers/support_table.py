"""``mmkernels support``: a table of model families, each cell of which comes from a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from mmkernels import machine
from mmkernels.integrations.transformers.registration import register
from mmkernels.integrations.transformers.support import NOT_SET, NOTHING, YES, Support, check
from mmkernels.integrations.transformers.support_compare import WAYS, Comparison
from mmkernels.integrations.transformers.support_patched import Patched, check_patched
from mmkernels.interrupts import Interrupted
from mmkernels.report import Footnotes, console, progress_bar, table
from mmkernels.runtime.dispatch import TABLES, Backend
from mmkernels.testing.families import find
from mmkernels.testing.models import Family

WIDTH = 120

_OP = "cross_attention"

_LEGEND = (
    "modules: attention modules that ran on mmkernels, of all that ran.\n"
    "spans, dense, none, bias: their calls in one forward pass, by mask.\n"
    "calls, syncs a layer: the most that one run of such a module made; a sync reads values, and waits on a device.\n"
    "forward, gradient: float32 is at most twice as far from float64 as transformers' own attention (sdpa, eager).\n"
    'loading: from_pretrained and _from_config with attn_implementation="mmkernels" equal set_attn_implementation.\n'
    f"generation: the same tokens as transformers' own attention; all: {', '.join(WAYS)}."
)

_LEGEND_PATCHED = (
    "The model before and after mmkernels.patch(model): errors as above, on inputs with labels where it has a loss.\n"
    "generation: the ways that gave the same tokens as before."
)


def run_support(names: Sequence[str]) -> bool:
    """Checks the families of these names, or all, and prints the table. Returns whether no family fails.

    Raises:
        BadInput: no family has this name.
        ImportError: as `mmkernels.integrations.transformers.register`.
        Interrupted: by Ctrl-C; the families that were checked are in the table.
    """
    families = find(names)
    register()
    rows: list[Support] = []
    patched: list[Patched] = []
    interrupted = False
    with progress_bar(len(families)) as advance, _recorded() as ran:
        try:
            for family in families:
                row, after = support_table([family], advance)[0]
                rows.append(row)
                patched.append(after)
        except KeyboardInterrupt:
            interrupted = True
    if rows:
        tables = (*_rendered(rows), Text("\nafter mmkernels.patch:"), *_rendered_patched(patched))
        console(WIDTH).print(Group(*tables, Text(_facts(ran), style="dim")))
    if interrupted:
        raise Interrupted(f"{len(rows)} of {len(families)} families were checked")
    return not any(row.failures for row in rows) and not any(row.failures for row in patched)


def support_table(
    families: Sequence[Family], advance: Callable[[str], None] = lambda name: None
) -> list[tuple[Support, Patched]]:
    """Returns two rows for each family, as it is set to "mmkernels" and as it is patched.

    `advance` is called with the family's name before it is checked.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for a second thread
    try:
        rows = []
        for family in families:
            advance(family.name)
            compare = Comparison(family)
            rows.append((check(family, compare), check_patched(family, compare)))
        return rows
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _recorded() -> Iterator[Counter[str]]:
    """Counts how many calls of cross-attention each backend runs inside the ``with`` block."""
    ran = Counter[str]()
    entries = TABLES[_OP]

    def recording(entry: Backend) -> Backend:
        def run(*args: Any) -> Any:
            ran[entry.name] += 1
            return entry.run(*args)

        return replace(entry, run=run)

    TABLES[_OP] = tuple(map(recording, entries))
    try:
        yield ran
    finally:
        TABLES[_OP] = entries


def _facts(ran: Counter[str]) -> str:
    versions = machine.versions()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("mmkernels", "torch", "transformers"))
    backends = ", ".join(f"{backend} ({calls:,} calls)" for backend, calls in ran.most_common()) or "no backend"
    return f"{packages}; {_OP} ran on {backends}"


def _rendered(rows: Sequence[Support]) -> Iterator[Table | Text]:
    notes = Footnotes()
    names = ("modules", "spans", "dense", "none", "bias", "calls\na\nlayer", "syncs\na\nlayer")
    numbers = (Column(name, justify="right") for name in names)
    words = map(Column, ("forward", "gradient", "loading", "generation", "notes"))
    yield table([_row(row, notes) for row in rows], [Column("family", no_wrap=True), *numbers, *words])
    yield Text("\n".join(notes.lines()))
    yield Text(_LEGEND, style="dim")


def _rendered_patched(rows: Sequence[Patched]) -> Iterator[Table | Text]:
    notes = Footnotes()
    titles = ("patched modules by op", "loss", "forward", "gradient", "generation", "notes")
    yield table([_row_patched(row, notes) for row in rows], [Column("family", no_wrap=True), *map(Column, titles)])
    yield Text("\n".join(notes.lines()))
    yield Text(_LEGEND_PATCHED, style="dim")


def _row_patched(row: Patched, notes: Footnotes) -> list[Text]:
    modules = ", ".join(f"{count} {op}" for op, count in row.modules.items())
    said = [row.refused] if row.refused else [f"{what}: {reason}" for what, reason in row.failures.items()]
    said += [f"{way} generation, unpatched too: {reason}" for way, reason in row.not_offered.items()]
    cells = [Text(modules or NOTHING), _judged(YES if row.loss else NOTHING)]
    judged = [*map(_judged, (row.forward, row.gradients)), _ways(row)]
    return [Text(row.name), *cells, *judged, Text(notes.mark(*said))]


def _ways(row: Patched) -> Text:
    failed = [f"no {way}" for way in row.generation if way in row.failures]
    return Text(", ".join(row.equal + failed) or NOTHING, style="red" if failed else "green" if row.equal else "dim")


def _row(row: Support, notes: Footnotes) -> list[Text]:
    trace, calls = row.trace, row.trace.calls
    numbers = (calls.spans, calls.dense, calls.unmasked, calls.bias)
    counts = [str(count) for count in (*numbers, trace.calls_a_layer, trace.syncs_a_layer)]
    inside, ran = trace.inside.total(), trace.inside.total() + trace.outside.total()
    cells = [f"{inside} of {ran}" if ran else NOTHING, *(counts if inside else [NOTHING] * len(counts))]
    judged = [*map(_judged, (row.forward, row.gradients, row.loading)), _generation(row)]
    return [Text(row.name), *map(Text, cells), *judged, Text(notes.mark(*_notes(row)))]


def _judged(cell: str) -> Text:
    if cell == YES:
        return Text(YES, style="green")
    return Text(NOTHING, style="dim") if cell == NOTHING else Text("no", style="red")


def _generation(row: Support) -> Text:
    failed = [f"no {way}" for way in WAYS if way in row.failures]
    if failed:
        return Text(", ".join(row.equal + failed), style="red")
    if not row.equal:
        return Text(NOTHING, style="dim")
    others = [way for way in WAYS if way not in row.equal]
    return Text(f"all but {', '.join(others)}" if others else "all", style="green")


def _notes(row: Support) -> Iterator[str]:
    """What the cells of the row do not say."""
    if row.refused:
        yield row.refused
    elif row.trace.inside and row.trace.outside:
        yield f"modules with an attention of their own: {', '.join(sorted(row.trace.outside))}"
    if row.built:
        yield NOT_SET
    for reason in row.trace.calls.reasons:
        yield f"mask made dense: {reason}"
    for what, reason in row.failures.items():
        yield f"{what}: {reason}"
    for way, reason in row.not_offered.items():
        yield f"{way} generation, on transformers' own attention too: {reason}"
