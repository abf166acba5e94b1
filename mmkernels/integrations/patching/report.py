"""`PatchReport`: what `patch` has replaced in a model and what it has left, as a table in plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Replaced:
    """Modules of one class that run on an op.

    Args:
        what: what they compute, such as "language-model loss".
        module: the name of their class.
        count: how many.
        op: the op that computes it, such as "linear_cross_entropy".
        effect: what to expect of it, in a few words.
    """

    what: str
    module: str
    count: int
    op: str
    effect: str


@dataclass(frozen=True)
class Kept:
    """Modules of one class that stay as they are.

    Args:
        what: what they compute.
        module: the name of their class.
        count: how many.
        why: the reason, as the end of a sentence: "its weight is quantised".
    """

    what: str
    module: str
    count: int
    why: str


@dataclass(frozen=True)
class PatchReport:
    """What `mmkernels.patch` or `mmkernels.unpatch` did to a model; ``print(report)`` prints it as tables.

    Args:
        model: the name of the model's class.
        replaced: what runs on mmkernels now, also by an earlier call; after `unpatch`: what did until now.
        left: what stays as it is, with the reasons.
        restored: the report is of `unpatch`.

    Example:
        >>> from mmkernels.integrations.patching.report import PatchReport, Replaced
        >>> row = Replaced("attention", "LlamaAttention", 2, "cross_attention", "no score matrix")
        >>> print(PatchReport("LlamaForCausalLM", (row,)))
        LlamaForCausalLM: 2 modules run on mmkernels
        what       module          count  op               effect
        ---------  --------------  -----  ---------------  ---------------
        attention  LlamaAttention  2      cross_attention  no score matrix
    """

    model: str
    replaced: tuple[Replaced, ...] = ()
    left: tuple[Kept, ...] = ()
    restored: bool = False

    @property
    def ops(self) -> dict[str, int]:
        """How many modules run on each op."""
        counts = Counter[str]()
        for row in self.replaced:
            counts[row.op] += row.count
        return dict(counts)

    def __str__(self) -> str:
        count = sum(row.count for row in self.replaced)
        modules = "1 module" if count == 1 else f"{count} modules"
        if self.restored:
            said = f"{modules} restored" if count else "nothing to restore"
        else:
            said = f"{modules} {'runs' if count == 1 else 'run'} on mmkernels"
        lines = [f"{self.model}: {said}"]
        if self.replaced:
            rows = [(x.what, x.module, str(x.count), x.op, x.effect) for x in self.replaced]
            lines += table(("what", "module", "count", "op", "effect"), rows)
        if self.left:
            kept = [(x.what, x.module, str(x.count), x.why) for x in self.left]
            lines += ["", "left as it is:", *table(("what", "module", "count", "why"), kept)]
        return "\n".join(lines)


def replaced_rows(found: Iterable[tuple[str, str, str, str]]) -> tuple[Replaced, ...]:
    """Returns rows in order of appearance.

    Args:
        found: what, class, op and effect of each module.
    """
    counts = Counter(found)
    return tuple(Replaced(what, module, count, op, effect) for (what, module, op, effect), count in counts.items())


def kept_rows(found: Iterable[tuple[str, str, str]]) -> tuple[Kept, ...]:
    """Returns rows in order of appearance.

    Args:
        found: what, class and reason of each module.
    """
    counts = Counter(found)
    return tuple(Kept(what, module, count, why) for (what, module, why), count in counts.items())


def table(titles: Cells, rows: Sequence[Cells]) -> list[str]:
    """Returns the lines of a table; a column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [titles, tuple("-" * width for width in widths), *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
