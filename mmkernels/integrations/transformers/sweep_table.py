"""``mmkernels support --all``: the table of all model types of transformers, ``docs/support.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median

from mmkernels import machine
from mmkernels.integrations.transformers.registration import register
from mmkernels.integrations.transformers.support import NOTHING
from mmkernels.integrations.transformers.sweep import (
    DIFFERS,
    RESULTS,
    Row,
    check_class,
    measure_class,
    model_types,
    sweep,
)
from mmkernels.interrupts import Interrupted
from mmkernels.options import BadInput
from mmkernels.report import console, markdown, plural, prepare_folder, progress_bar, table

COMMAND = "mmkernels support --all --measure --out docs/support.md"

_COLUMNS = {
    "model type": "model_type",
    "class": "model",
    "result": "result",
    "forward": "forward",
    "gradient": "gradients",
    "left": "left",
    "right": "right",
    "loading": "loading",
    "generation": "generation",
    "calls a layer": "calls",
    "syncs a layer": "syncs",
    "patched": "patched",
    "patched forward": "patched_forward",
    "patched gradient": "patched_gradients",
    "patched generation": "patched_generation",
    "speed": "speed",
    "memory": "memory",
    "note": "note",
}
"""Titles, and the fields of `Row`."""

_EXPLANATION = """\
Which models of transformers run on `attn_implementation="mmkernels"`, and what `mmkernels.patch(model)` makes of them,
found by running them: look yours up by the `model_type` in its `config.json`. Each model type is tried by one class,
the one that generates text if there is one, else the base model. Its configuration is made by a rule from the names of
its fields (`hidden_size`, ...) and never by hand, and all of its parameters are drawn anew. `mmkernels support` has
fewer models with sharper checks: images among the text, all ways to generate.

- **forward, gradient**: in float32 at most twice as far from the model in float64 as transformers' own attention.
- **left, right**: the same with padding on this side, at the positions that are not padding.
- **loading**: `from_pretrained` and `_from_config` with `attn_implementation="mmkernels"` give the same as
  `set_attn_implementation`.
- **generation**: the same tokens, greedy, with left padding where the model takes it.
- **calls, syncs a layer**: the most attention calls that one module made in a forward pass, and the most times that it
  read a tensor's values, for which it would wait if they lay on a device.
- **patched**: the ops that the model runs on after `mmkernels.patch(model)`, then the same comparisons of it with
  itself before, on inputs with labels where it has a loss.
- **speed, memory**: with `--measure`, of a model six times as wide with texts six times as long: how many times as
  fast one forward pass is after `patch`, and a training step; and what share of its memory a step still takes.
- `-`: not compared, because the class has no such thing or because transformers' own attention fails there too.

A model of text and images is given text alone where it takes that; in most cases its image encoder has a model type of
its own. "not built" and "eager fails" say nothing about the model: the rule is too simple for it.
"""


def run_sweep(names: Sequence[str], out: Path, measured: bool = False) -> bool:
    """Checks the model types of these names, or all, and writes the table. Returns whether nothing differs.

    Interrupted, it writes the rows that it has.

    Args:
        measured: larger models are measured too, which takes ten times as long.

    Raises:
        BadInput: there is no such model type, or the file can't be written.
        Interrupted: by Ctrl-C.
        ImportError: as `mmkernels.integrations.transformers.register`.
    """
    chosen = model_types(names)
    if out.is_dir():
        raise BadInput(f"--out must be a file, got the folder {out}")
    register()
    prepare_folder(out.parent)
    rows: list[Row] = []
    try:
        with progress_bar(len(chosen)) as advance:
            for row in sweep(chosen, advance, check=measure_class if measured else check_class):
                rows.append(row)
                if row.result == DIFFERS:
                    advance.result(f"{row.model_type}: {row.note}")
    except KeyboardInterrupt:
        raise Interrupted(f"{len(rows)} of {plural(len(chosen), 'model type')} are in {out}") from None
    finally:
        out.write_text(page(rows, len(chosen)))
    counts = Counter(row.result for row in rows)
    console().print(table([(result, str(counts[result])) for result in RESULTS], ("result", "model types")))
    console().print(f"written to {out}")
    return not counts[DIFFERS]


def page(rows: Sequence[Row], wanted: int) -> str:
    """Returns the page in Markdown. `wanted`: how many rows there would be if it had not been interrupted."""
    versions, middle = machine.versions(), _middle(rows)
    command = COMMAND if middle else COMMAND.replace(" --measure", "")
    packages = ", ".join(f"{name} {versions[name]}" for name in ("mmkernels", "torch", "transformers"))
    counts = Counter(row.result for row in rows)
    found = [(result, str(counts[result]), meaning) for result, meaning in RESULTS.items()]
    cells = [[getattr(row, name) for name in _COLUMNS.values()] for row in sorted(rows, key=lambda row: row.model_type)]
    interrupted = f"\nInterrupted after {len(rows)} of {plural(wanted, 'model type')}.\n" if len(rows) < wanted else ""
    return "\n".join(
        (
            "# Models of transformers\n",
            f"<!-- Written by `{command}`; do not edit. -->\n",
            _EXPLANATION,
            f"Found on {date.today():%Y-%m-%d} with {packages} by `{command}`.\n{interrupted}",
            markdown(found, ("result", "model types", "what it means")),
            *middle,
            markdown(cells, tuple(_COLUMNS)),
        )
    )


def _middle(rows: Sequence[Row]) -> list[str]:
    """Returns the sentence on the middle of all measured speeds; nothing was measured: no sentence."""
    speeds = [tuple(map(float, row.speed.split(", "))) for row in rows if row.speed != NOTHING]
    if not speeds:
        return []
    forward, step = (median(column) for column in zip(*speeds, strict=True))
    return [
        f"Half of the {len(speeds)} measured types are at least {forward:.2f} times as fast after `patch` in a forward "
        f"pass, and {step:.2f} times in a training step. A row is of a few runs of some milliseconds on "
        f"{machine.device_name('cpu')}, and varies by a fifth or more where the machine has other work.\n"
    ]
