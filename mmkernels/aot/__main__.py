"""``python -m mmkernels.aot``: compile every GPU kernel with no GPU there, and check what each takes.

Fails where a kernel does not compile, needs more shared memory than its target has, or takes more than its op's plan
allows. Prints what changed since the last run, which ``build/aot`` keeps. ``--op`` compiles those of one op.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from mmkernels.aot import cache, cuda
from mmkernels.aot.resources import Row, Usage
from mmkernels.interrupts import ends_well
from mmkernels.plan import SHARED_BYTES, TARGETS
from mmkernels.report import console, plural, table
from mmkernels.runtime import tuning

QUICK = ("sm_90", "gfx942")
"""What is compiled without ``--all``: the target whose code is watched most closely, and the one that differs from it
the most (another compiler back end, no copy engine) and has the least shared memory. The choice does not rotate: a
failure comes again, and a second run compiles nothing."""

_WIDTH = 190  # columns of the table
_LAST = "last"  # the cached rows of the last run


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 where everything is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m mmkernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help=f"all of {', '.join(TARGETS)}; default: {', '.join(QUICK)}")
    parser.add_argument("--table", action="store_true", help="print what every kernel takes")
    parser.add_argument("--frontend", action="store_true", help="only see whether Triton accepts its kernels")
    parser.add_argument("--op", choices=sorted(tuning.plans()), help="only its Triton kernels")
    options = parser.parse_args(arguments)
    targets = TARGETS if options.all else QUICK
    begin = time.perf_counter()
    from mmkernels.aot.build import compile_entries, translate_entries
    from mmkernels.aot.launches import entries

    wanted = [entry for entry in entries(targets) if options.op in (None, entry.op)]
    if options.frontend:
        count = translate_entries(wanted)
        accepted = f"{plural(len(wanted), 'kernel')} ({count} for the first time)"
        print(f"Triton {triton_version()} accepts {accepted}{_since(begin)}")
        return 0
    compilers = versions() if options.op is None else {"triton": triton_version()}
    print(", ".join(f"{name} {version}" for name, version in compilers.items()))
    rows, compiled = compile_entries(wanted)
    if "nvcc" in compilers:
        by_hand, more = cuda.compile_all([t for t in cuda.TARGETS if t.removesuffix("a") in targets])
        rows, compiled = rows + by_hand, compiled + more
    if options.table:
        print_table(rows)
    for line in changes(rows, compilers) if options.op is None else ():
        print(line)
    problems = check(rows)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    outcome = plural(len(problems), "problem") if problems else "no problem"
    made = f"{plural(len(rows), 'kernel')} for {', '.join(targets)}, {compiled} of them compiled now"
    print(f"{made}{_since(begin)}: {outcome}")
    return 1 if problems else 0


def _since(begin: float) -> str:
    return f", in {time.perf_counter() - begin:.0f} s"


def versions() -> dict[str, str]:
    """Returns the compilers' versions. Without nvcc there is none for CUDA C++."""
    found = {"triton": triton_version()}
    reason = cuda.why_not()
    if reason is None:
        found["nvcc"] = cuda.nvcc_version().partition("release ")[2].partition(",")[0]
    else:
        print(f"skipped: the CUDA C++ kernels are not compiled: {reason}")
    return found


def triton_version() -> str:
    import triton

    return str(triton.__version__)


def check(rows: Sequence[Row]) -> list[str]:
    """Returns the kernels that could not be launched, or that take more than a `Limit` of their op's plan allows."""
    problems = []
    for row in rows:
        usage = row.usage
        shared = SHARED_BYTES.get(row.target.removesuffix("a"))
        if shared is not None and usage.shared_bytes > shared:
            problems.append(f"{row.name} needs {usage.shared_bytes} bytes of shared memory, there are {shared}")
        plan = tuning.plan(row.op)
        for limit in plan.limits if plan is not None else ():
            if not limit.matches(row.kernel, row.variant, row.target):
                continue
            if limit.spilled_bytes is not None and usage.spilled_bytes > limit.spilled_bytes:
                allowed = f", {limit.spilled_bytes} are allowed" if limit.spilled_bytes else ""
                problems.append(f"{row.name} spills {usage.spilled_bytes} bytes{allowed}")
            if limit.registers is not None and usage.registers > limit.registers:
                problems.append(f"{row.name} takes {usage.registers} registers, {limit.registers} are allowed")
    return problems


def changes(rows: Sequence[Row], compilers: dict[str, str]) -> list[str]:
    """Returns what differs from the last run, for people, and keeps these rows for the next.

    Rows of targets that this run leaves out stay. Nothing is compared with what other compilers made.
    """
    last = cache.read(_LAST) or {"compilers": compilers, "rows": {}}
    now = {"; ".join(key): list(row.usage) for key, row in _numbered(rows)}
    same_compilers = last["compilers"] == compilers
    before: dict[str, list[int]] = last["rows"] if same_compilers else {}
    targets = {row.target for row in rows}
    compared = {key: usage for key, usage in before.items() if key.split("; ")[3] in targets}
    cache.write(_LAST, {"compilers": compilers, "rows": before | now} if same_compilers else
                {"compilers": compilers, "rows": now})  # fmt: skip
    if not same_compilers:
        return [f"not compared with the last run, which used {last['compilers']}"]
    if not compared:
        return []
    lines = [
        f"changed: {key}: {_difference(compared[key], usage)}"
        for key, usage in now.items()
        if key in compared and compared[key] != usage
    ]
    new, gone = len(now.keys() - compared.keys()), len(compared.keys() - now.keys())
    return lines + ([f"since the last run: {new} new, {gone} gone"] if new or gone else [])


def _numbered(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Each row with a name that no other has: a variant may launch one kernel with several signatures."""
    numbers: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        name = (row.op, row.kernel, row.variant, row.target)
        numbers[name] += 1
        yield (*name, str(numbers[name])), row


def _difference(before: Sequence[int], now: Sequence[int]) -> str:
    return ", ".join(
        f"{name} {a} -> {b}" for name, a, b in zip(Usage._fields, before, now, strict=True) if a != b
    )  # fmt: skip


def print_table(rows: Sequence[Row]) -> None:
    """Prints a line for each kernel and variant, with its `Usage` by target."""
    targets = sorted({row.target for row in rows}, key=lambda name: (len(name.rstrip("a")), name))
    for op in dict.fromkeys(row.op for row in rows):
        usages: dict[tuple[str, ...], dict[str, str]] = {}
        for (_, kernel, variant, target, number), row in _numbered([row for row in rows if row.op == op]):
            usages.setdefault((kernel, variant, number), {})[target] = str(row.usage)
        cells = [
            [kernel, variant, *(usage.get(target, "-") for target in targets)]
            for (kernel, variant, _), usage in usages.items()
        ]
        print(f"{op}: registers/spilled bytes/KiB shared/KiB code")
        console(_WIDTH).print(table(cells, ["kernel", "variant", *targets], texts=2))


if __name__ == "__main__":
    with ends_well("mmkernels.aot", "what was compiled is kept"):
        sys.exit(main())
