"""``python -m mmkernels.aot``: compile every GPU kernel with no GPU there, print and check what each takes.

Fails where a kernel does not compile, needs more shared memory than its target has, spills registers on Hopper at head
dims 64 and 128 or where a contrastive op's time goes (CUDA C++ kernels: anywhere), or takes something else than the
committed table says (``--update`` writes that).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path

from mmkernels.aot import cuda
from mmkernels.aot.resources import Resources

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("table.csv")
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_NO_SPILLS = ("D64", "D128")
_NO_SPILLS_OF = ("info_nce_kernel", "info_nce_gradient_kernel", "sigmoid_kernel", "ranks_kernel")
_NO_SPILLS_AT = ("D768 place", "D768 none")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 where everything is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m mmkernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} instead of comparing with it")
    parser.add_argument(
        "--frontend", action="store_true", help="only see whether Triton accepts its kernels, in seconds"
    )
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    if options.frontend:
        from mmkernels.aot.variants import translate_triton

        count = translate_triton()
        print(f"Triton {triton_version()} accepts {count} kernels, in {time.perf_counter() - begin:.0f} s")
        return 0
    compilers = versions()
    print(", ".join(f"{name} {version}" for name, version in compilers.items()))
    found = compile_all(compilers)
    print_table(found)
    problems = check(found)
    if options.update:
        write_table(found, compilers)
    else:
        problems += differences(found, compilers)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    outcome = f"{len(problems)} problems" if problems else "no problem"
    print(f"{len(found)} kernels compiled in {time.perf_counter() - begin:.0f} s: {outcome}")
    return 1 if problems else 0


def versions() -> dict[str, str]:
    """The compilers; what they make depends on them. Without nvcc there is none for CUDA C++."""
    found = {"triton": triton_version()}
    reason = cuda.why_not()
    if reason is None:
        answer = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        found["nvcc"] = answer.partition("release ")[2].partition(",")[0]
    else:
        print(f"skipped: the CUDA C++ kernels are not compiled: {reason}")
    return found


def triton_version() -> str:
    import triton

    return str(triton.__version__)


# Compiling.


def compile_all(compilers: dict[str, str]) -> list[Resources]:
    """Every kernel's resources; what has been compiled from the same sources before is read again."""
    kept = ROOT / "build" / "aot" / f"{_sources_hash(compilers)}.json"
    if kept.exists():
        return [Resources(**row) for row in json.loads(kept.read_text())]
    from mmkernels.aot.variants import compile_triton

    found = compile_triton()
    if "nvcc" in compilers:
        found += cuda.compile_all()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps([asdict(row) for row in sorted(found)]))
    return sorted(found)


def _sources_hash(compilers: dict[str, str]) -> str:
    state = hashlib.sha256(repr(compilers).encode())
    for path in sorted([*ROOT.glob("mmkernels/**/*.py"), *ROOT.glob("csrc/**/*")]):
        if path.is_file():
            state.update(path.read_bytes())
    return state.hexdigest()[:16]


# What is wrong.


def check(found: Iterable[Resources]) -> list[str]:
    """Kernels that spill where they must not, or that could not be launched."""
    problems = []
    for row in found:
        name = f"{row.kernel}, {row.variant}, {row.target}"
        limit = SHARED_LIMITS.get(row.target.removesuffix("a"))
        if limit is not None and row.shared_bytes > limit:
            problems.append(f"{name} needs {row.shared_bytes} bytes of shared memory, there are {limit}")
        by_hand = row.target.endswith("a") or "row tile" in row.variant
        watched = any(dim in row.variant.split() for dim in _NO_SPILLS)
        watched |= row.kernel in _NO_SPILLS_OF and any(kind in row.variant for kind in _NO_SPILLS_AT)
        watched &= row.target == "sm_90"
        if row.spilled_bytes and (by_hand or watched):
            problems.append(f"{name} spills {row.spilled_bytes} bytes")
    return problems


def differences(found: list[Resources], compilers: dict[str, str]) -> list[str]:
    """What is not as in the committed table, which is only asked about the compilers that made it."""
    if not TABLE.exists():
        return [f"there is no {TABLE.name}: run python -m mmkernels.aot --update"]
    made_by, rows = read_table()
    if any(made_by.get(name) != version for name, version in compilers.items()):
        print(f"not compared with {TABLE.name}, which other compilers made: {made_by}")
        return []
    expected = {row[:3]: row for row in map(astuple, rows) if "nvcc" in compilers or not _is_cuda(Resources(*row))}
    now = {row[:3]: row for row in map(astuple, found)}
    names = [field.name for field in fields(Resources)][3:]
    problems = []
    for key in sorted(expected.keys() | now.keys()):
        before, after = expected.get(key), now.get(key)
        if before != after:
            values = [None if row is None else dict(zip(names, row[3:], strict=True)) for row in (before, after)]
            problems.append(f"{', '.join(key)}: the table says {values[0]}, now {values[1]}")
    if problems:
        problems.append("if that is meant: python -m mmkernels.aot --update")
    return problems


def _is_cuda(row: Resources) -> bool:
    return row.kernel.startswith("decode_")


# The table.


def write_table(found: list[Resources], compilers: dict[str, str]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write("# " + json.dumps(compilers) + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Resources)])
        writer.writerows(map(astuple, found))


def read_table() -> tuple[dict[str, str], list[Resources]]:
    with TABLE.open(newline="") as file:
        made_by = json.loads(file.readline().removeprefix("# "))
        rows = list(csv.reader(file))[1:]
        return made_by, [Resources(a, b, c, *map(int, numbers)) for a, b, c, *numbers in rows]


def print_table(found: list[Resources]) -> None:
    """A row for each kernel and variant; registers, spilled bytes, KiB of shared memory and of code by target."""
    for by_hand in (True, False):
        rows = [row for row in found if _is_cuda(row) == by_hand]
        if not rows:
            continue
        columns = sorted({row.target for row in rows}, key=lambda name: (len(name.rstrip("a")), name))
        print(f"\n{'registers/spilled bytes/KiB shared/KiB code':70}" + "".join(f"{t:>18}" for t in columns))
        by_name: dict[tuple[str, str], dict[str, Resources]] = {}
        for row in rows:
            by_name.setdefault((row.kernel, row.variant), {})[row.target] = row
        for (kernel, variant), cells in by_name.items():
            print(f"{kernel:34}{variant:36}" + "".join(f"{_cell(cells.get(t)):>18}" for t in columns))
    print()


def _cell(row: Resources | None) -> str:
    if row is None:
        return "-"
    return f"{row.registers}/{row.spilled_bytes}/{row.shared_bytes / 1024:.0f}/{row.code_bytes / 1024:.0f}"


if __name__ == "__main__":
    sys.exit(main())
