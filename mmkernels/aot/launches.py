"""The launches that each op makes for the variants of its plan: recorded, with no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.aot.triton import Job, describe
from mmkernels.ops import specs
from mmkernels.plan import Variant
from mmkernels.runtime import tuning
from mmkernels.runtime.triton import Launch, recorded
from mmkernels.spec import flatten


class Entry(NamedTuple):
    """A row of the resource table whose kernel is not compiled yet."""

    op: str
    variant: str
    job: Job

    @property
    def name(self) -> str:
        return f"{self.job.kernel}, {self.variant}, {self.job.target}"


def entries(targets: Sequence[str]) -> Iterator[Entry]:
    """Returns what is compiled for the targets; for one op and target the same code once."""
    for op, plan in tuning.plans().items():
        for target in targets:
            seen: set[Job] = set()
            for variant in plan.variants:
                for launch in launches(op, variant, target) if target in variant.targets else ():
                    job = describe(launch, target)
                    if job not in seen:
                        seen.add(job)
                        yield Entry(op, variant.name, job)


def launches(op: str, variant: Variant, target: str) -> list[Launch]:
    """Returns what an op launches for a variant on a GPU of architecture `target`. No kernel runs."""
    inputs = {name: _argument(x, name in variant.grads) for name, x in variant.make().items()}
    with tuning.pretend(target), recorded() as found:
        outputs = flatten(specs()[op].function(**inputs, backend="triton"))
        if variant.grads:
            differentiable = [x for x in outputs if x.requires_grad]
            leaves = [inputs[name] for name in variant.grads]
            torch.autograd.grad(differentiable, leaves, [torch.empty_like(x) for x in differentiable])
    return found


def _argument(x: Any, differentiate: bool) -> Any:
    """Returns a leaf of its own for each tensor: two arguments may be made as one tensor."""
    return x.detach().requires_grad_(differentiate) if isinstance(x, Tensor) else x
