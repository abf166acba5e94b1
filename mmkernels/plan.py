"""`Plan`: an op's GPU kernels as tools see them, defined once in ``ops/<family>/<op>/plan.py`` as ``PLAN``."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""The most shared memory of a block, by architecture."""
TARGETS = tuple(SHARED_BYTES)
"""The architectures that defaults exist for and that kernels are compiled for ahead of time."""


@dataclass(frozen=True)
class Config:
    """Tile sizes of a kernel, and how it is launched.

    Args:
        block_q, block_k: rows (of queries, images, tokens) and columns (of keys, texts, words) of one tile.
        warps: of one program.
        stages: of the software pipeline over tiles.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int


Tiles = Mapping[str, Sequence[tuple[int, int, int, int]]]
"""By kernel: the fields of a `Config` for dims up to 64, 128 and 256, or one entry for all of them."""


@dataclass(frozen=True)
class Variant:
    """Arguments whose kernels are compiled ahead of time: the op is called with them while launches are recorded.

    Args:
        name: what tables print, such as "bfloat16 D64 spans training".
        make: makes the public function's keyword arguments on the CPU. Their values do not matter.
        grads: the arguments to differentiate by; empty: forward only.
        targets: of `TARGETS`.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    grads: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class Limit:
    """What matching kernels may take, where the target's own limits are not enough.

    Args:
        kernels, variants, targets: shell patterns, of which one of each must match; a variant matches as " NAME ".
        spilled_bytes: of a thread; None: any.
        registers: of a thread, where more would halve how many programs a multiprocessor holds; None: any.
    """

    kernels: tuple[str, ...] = ("*",)
    variants: tuple[str, ...] = ("*",)
    targets: tuple[str, ...] = ("*",)
    spilled_bytes: int | None = 0
    registers: int | None = None

    def matches(self, kernel: str, variant: str, target: str) -> bool:
        """Returns whether the limit is for a kernel."""
        names = ((kernel, self.kernels), (f" {variant} ", self.variants), (target, self.targets))
        return all(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name, patterns in names)


@dataclass(frozen=True)
class Problem:
    """What a kernel is timed on.

    Args:
        make: takes a generator and the dim (of heads or of features), returns the op's arguments.
        grads: what is differentiated by; only the backward pass is then timed.
        whole: the forward pass is timed too, because it computes the gradients.
    """

    make: Callable[[torch.Generator, int], dict[str, Any]]
    grads: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Search:
    """The configurations of a kernel that ``benchmarks/tune.py`` tries.

    Args:
        rows, columns, warps, stages: all combinations of these.
        problems: what they are timed on.
        heaviest: the call that takes the kernel the most registers and shared memory. A row of tuned.json serves that
            call too, so what can't run it is no candidate.
        least_shared: configuration, dim, bytes of an element -> bytes of shared memory that the kernel takes at least.
            What exceeds the GPU's is not compiled.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    warps: Sequence[int]
    stages: Sequence[int]
    problems: tuple[Problem, ...]
    heaviest: Problem
    least_shared: Callable[[Config, int, int], int] = lambda config, dim, size: 0


@dataclass(frozen=True)
class CudaSource:
    """A CUDA C++ source file of the op.

    Args:
        path: below ``csrc``.
        arguments: how a table prints the kernels' integer template arguments, in their order.
        shared_bytes: a header below ``csrc`` and its function from a kernel's first integer template argument to the
            bytes of dynamic shared memory of a launch.
    """

    path: str
    arguments: tuple[str, ...]
    shared_bytes: tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """An op's GPU kernels.

    Args:
        tiles: the default configurations of every tunable kernel, by architecture.
        float32: the most rows and columns of a float32 tile, for dims up to 64, 128 and 256. It is multiplied without
            tensor cores, and wants small tiles and many warps.
        variants: what is compiled ahead of time.
        limits: what the compiled kernels may take.
        searches: by kernel, what tune.py searches; a kernel that is left out keeps its default.
        why_not: the op's record of arguments -> why the Triton kernels can't run this call, or None.
        cuda: the op's CUDA C++ kernels.
    """

    tiles: Mapping[str, Tiles]
    float32: Sequence[int]
    variants: tuple[Variant, ...]
    limits: tuple[Limit, ...] = ()
    searches: Mapping[str, Search] = field(default_factory=dict)
    why_not: Callable[[Any], str | None] = lambda inputs: None
    cuda: CudaSource | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the tunable kernels."""
        return tuple(next(iter(self.tiles.values())))
