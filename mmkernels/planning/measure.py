"""Measures what the cost model stands on: blocks of the loss and messages between ranks, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mmkernels.machine import memory_of
from mmkernels.meters import time_once
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.options import DTYPES
from mmkernels.planning.model import Curve, MeasuredRates

__all__ = ["BLOCKS", "MESSAGES", "Samples", "curves", "sample"]

BLOCKS = (128, 512, 2048)
"""The rows and columns of the blocks that are timed."""
MESSAGES = (2**10, 2**16, 2**20, 2**23)
"""The bytes of the messages that are timed."""
_LEAST = 0.01  # seconds of one sample: shorter calls are repeated within it

Samples = dict[tuple[str, int], float]
"""Seconds by what was timed ("forward", "backward" or "message") and its size, in logits or bytes."""


def sample(
    dim: int, dtype: str, device: str, group: dist.ProcessGroup | None = None, sizes: Sequence[int] = BLOCKS
) -> Samples:
    """Times each block and, where there is a group, each message once, on all its ranks at the same time."""
    found: Samples = {}
    for size in sizes:
        forward, backward = _block(size, dim, DTYPES[dtype], device)
        for name, run in (("forward", forward), ("backward", backward)):
            found[name, size * size] = _together(run, device, group)
    if group is not None:
        for size in MESSAGES:
            found["message", size] = _together(_message(size, group), "cpu", group)
    return found


def curves(samples: Sequence[Samples], sharing: float, ranks_here: int, wire_rate: float | None) -> MeasuredRates:
    """Returns the rates of the median of each sample.

    Args:
        samples: of `sample`, of one or more ranks and times.
        sharing: ranks for each core.
        ranks_here: ranks that share this machine's memory.
        wire_rate: bytes a second between two ranks; None: as it was measured.
    """

    def curve(name: str) -> Curve:
        sizes = sorted({size for found in samples for kind, size in found if kind == name})
        return Curve([(size, statistics.median(x[name, size] for x in samples if (name, size) in x)) for size in sizes])

    return MeasuredRates(
        curve("forward"), curve("backward"), curve("message"), sharing, memory_of("cpu") / ranks_here, wire_rate
    )


def _block(size: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns calls of a block's forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(size, dim, generator=generator), dim=1)
        .to(device, dtype)
        .requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    loss = info_nce(image, text, scale)
    return (
        lambda: info_nce(image.detach(), text.detach(), scale.detach()),
        lambda: torch.autograd.grad(loss, (image, text, scale), retain_graph=True),
    )


def _message(size: int, group: dist.ProcessGroup) -> Callable[[], Any]:
    """Returns a call that sends so many bytes to the next rank of the group, and receives as many."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    to, source = ((rank + step) % count for step in (1, -1))
    sent, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)

    def run() -> None:
        works = [
            dist.isend(sent, group=group, group_dst=to),
            dist.irecv(received, group=group, group_src=source),
        ]
        for work in works:
            if work is not None:
                work.wait()

    return run


def _together(run: Callable[[], Any], device: str, group: dist.ProcessGroup | None) -> float:
    """Returns the seconds of one call, while the group's other ranks make the same calls."""
    run()
    calls = torch.tensor([max(1, int(_LEAST / time_once(run, device)))])
    if group is not None:
        dist.all_reduce(calls, dist.ReduceOp.MAX, group=group)
    repeats = int(calls)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / repeats
