"""The rows of the ops' benchmarks: a row is one configuration, dtype and pass of an op."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mmkernels.options import DTYPES, BadInput
from mmkernels.spec import Benchmark, OpSpec
from mmkernels.targets import Target


@dataclass(frozen=True, repr=False)
class Row:
    """One row of a benchmark.

    Args:
        dtype: a name in `DTYPES`.
        backward: forward + backward instead of forward.
        compile_only: nothing is measured; each candidate but the naive one runs once, so that what its compiler keeps
            on disk exists when the row is measured.
        quick: measured in few rounds, beside those peers that neither prepare nor run long.
    """

    spec: OpSpec
    config: Benchmark
    dtype: str
    backward: bool
    device: str = "cpu"
    compile_only: bool = False
    quick: bool = False

    def __str__(self) -> str:  # pytest's name of the row, also in the JSON
        return f"{self.config.id}, {self.dtype}, {self.passes}"

    __repr__ = __str__

    @property
    def passes(self) -> str:
        return "forward + backward" if self.backward else "forward"

    @property
    def grads(self) -> tuple[str, ...]:
        """Names of the arguments that the row differentiates by."""
        return self.config.grads if self.backward else ()

    @property
    def targets(self) -> list[Target]:
        """The targets that are set for this row."""
        key = (self.dtype, self.backward, kind(self.device))
        return [target for target in self.config.targets if (target.dtype, target.backward, target.device) == key]


def kind(device: str) -> str:
    """Returns the kind of a device as configurations and targets name it."""
    return "cpu" if torch.device(device).type == "cpu" else "gpu"


def rows(spec: OpSpec, dtypes: Iterable[str], device: str = "cpu", *, quick: bool = False) -> list[Row]:
    """Returns the rows of an op for this kind of device.

    Args:
        quick: only the headline configurations, each with its backward pass if it has one.
    """
    configs = [
        config for config in spec.benchmarks if kind(device) in config.devices and (config.headline or not quick)
    ]
    return [
        Row(spec, config, dtype, backward, device, quick=quick)
        for dtype in dtypes
        for backward in (False, True)
        for config in configs
        if (config.grads or not backward) and (backward or not config.grads or not quick)
    ]


_ENDING = re.compile(rf", ({'|'.join(DTYPES)})(, forward( \+ backward)?)?$")


def _configurations(names: Iterable[str]) -> list[str]:
    """Returns the names without their dtypes and passes."""
    return list(dict.fromkeys(_ENDING.sub("", name) for name in names))


def select(names: Sequence[str], wanted: str) -> list[bool]:
    """Returns for each row's name whether a filter such as "decode,media, bf16" selects it; "" selects all.

    A row is selected if its name contains one of the filter's parts. Commas separate the parts. As rows' names contain
    commas too, the longest text that some name contains is one part: here "decode" and "media, bf16".

    Raises:
        BadInput: a part is in no name.
    """
    if not wanted:
        return [True] * len(names)
    pieces, parts = wanted.split(","), []
    while pieces:
        for count in range(len(pieces), 0, -1):
            part = ",".join(pieces[:count]).strip()
            if any(part in name for name in names):
                break
        else:
            raise BadInput(f"--filter: no row is named {part!r}; there are: {'; '.join(_configurations(names))}")
        if part:  # it is empty between two commas
            parts.append(part)
        del pieces[:count]
    return [any(part in name for part in parts) for name in names]
