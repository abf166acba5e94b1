"""Measures what the cost model stands on: blocks of the loss, messages between ranks, and the smallest step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkernels.machine import memory_of
from mmkernels.meters import time_once
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.ops.contrastive.info_nce.block import (
    BACKWARD,
    BLOCK,
    BackwardArguments,
    BlockArguments,
)
from mmkernels.ops.contrastive.info_nce.reduction import CLASSES
from mmkernels.options import DTYPES
from mmkernels.planning.model import Curve, MeasuredRates, Took
from mmkernels.planning.ring import Step
from mmkernels.runtime.dispatch import resolve
from mmkernels.runtime.group import Group, check_group

__all__ = [
    "MESSAGES",
    "Samples",
    "block_shapes",
    "curves",
    "memory_for",
    "message_rate",
    "pairs",
    "sample_blocks",
    "sample_ring",
    "step_on",
]

FEWEST = 8
"""The rows of the smallest block, and of a rank in the smallest step."""
MESSAGES = (2**13, 2**17, 2**20, 2**22)
"""The bytes of the messages that are timed."""
_SHARES = (1 / 64, 1 / 16, 1 / 4, 1, 4)  # of the rows of a piece, which the timed blocks have
_MOST_FLOPS = {"cpu": 5e9, "cuda": 5e12}  # of a timed block's forward pass; larger ones take as long for each logit
_LEAST = 0.02  # seconds of one sample: shorter calls are repeated within it
SCALE = 50.0

Samples = dict[tuple[str, int], Took]
"""Times by what was called and its size: "forward" and "backward" by logits, "message" by bytes, "step" by ranks."""


def pairs(rows: int, dim: int, dtype: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns features of images and texts, [rows, dim], to differentiate by."""
    generator = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(2, rows, dim, generator=generator), dim=2).to(device, DTYPES[dtype])
    image, text = (x.contiguous().requires_grad_() for x in drawn)
    return image, text


def block_shapes(dim: int, dtype: str, *, gpu: bool) -> list[tuple[int, int]]:
    """Returns images and texts of the blocks that are timed: as in the ring, no more texts than a piece has."""
    piece = Step(2**36, dim, 1, dtype, gpu).piece
    sizes = sorted({FEWEST, *(max(FEWEST, int(share * piece)) for share in _SHARES)})
    shapes = [(rows, min(rows, piece)) for rows in sizes]
    most = _MOST_FLOPS["cuda" if gpu else "cpu"]
    return [shapes[0], *(shape for shape in shapes[1:] if 2 * shape[0] * shape[1] * dim <= most)]


def sample_blocks(dim: int, dtype: str, device: str, group: dist.ProcessGroup | None = None) -> Samples:
    """Times each block once; where there is a group, on all its ranks at the same time."""
    found: Samples = {}
    for rows, columns in block_shapes(dim, dtype, gpu=device != "cpu"):
        forward, backward = _block(rows, columns, dim, dtype, device)
        found["forward", rows * columns] = _together(forward, device, group)
        found["backward", rows * columns] = _together(backward, device, group)
    return found


def sample_ring(dim: int, dtype: str, group: dist.ProcessGroup, alone: dist.ProcessGroup) -> Samples:
    """Times each message, and the smallest step, once on both ranks of a group; `alone` holds this rank only."""
    found: Samples = {}
    for size in MESSAGES:
        found["message", size] = _together(_message(size, group), "cpu", group)
    image, text = pairs(FEWEST, dim, dtype)
    for ranks, members in ((1, alone), (2, group)):
        found["step", ranks] = _together(step_on(image, text, members), "cpu", group)
    return found


def step_on(image: Tensor, text: Tensor, group: dist.ProcessGroup) -> Callable[[], Any]:
    """Returns a call of the loss and its gradients on this rank's pairs."""
    scale = torch.tensor(SCALE, requires_grad=True)

    def run() -> None:
        loss = info_nce(image, text, scale, group=group)
        torch.autograd.grad(loss, (image, text, scale))

    return run


def curves(samples: Sequence[Samples], sharing: float, memory_bytes: float, wire_rate: float | None) -> MeasuredRates:
    """Returns the rates of the median of each sample.

    Args:
        samples: of `sample_blocks` and `sample_ring`, of one or more ranks and times.
        sharing: ranks for each core.
        memory_bytes: that a rank may take.
        wire_rate: bytes a second between two ranks; None: they are on this machine.
    """

    def points(name: str) -> list[tuple[int, Took]]:
        sizes = sorted({size for found in samples for kind, size in found if kind == name})
        times = {size: [x[name, size] for x in samples if (name, size) in x] for size in sizes}
        return [(size, Took(*map(statistics.median, zip(*taken, strict=True)))) for size, taken in times.items()]

    (_, alone), (_, pair) = points("step")
    forward, backward = (Curve([(size, took.seconds) for size, took in points(x)]) for x in ("forward", "backward"))
    messages = points("message")
    handling = Curve([(size, min(took.busy for _, took in messages[i:])) for i, (size, _) in enumerate(messages)])
    return MeasuredRates(forward, backward, handling, alone, pair, sharing, memory_bytes, wire_rate)


def message_rate(samples: Sequence[Samples]) -> float:
    """Returns the bytes a second of the largest messages, each way."""
    size = MESSAGES[-1]
    return size / statistics.median(x["message", size].seconds for x in samples if ("message", size) in x)


def memory_for(ranks: int) -> float:
    """Returns the bytes of this machine's memory for each of the ranks on it."""
    return memory_of("cpu") / ranks


def _block(rows: int, columns: int, dim: int, dtype: str, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns calls of a block's forward and backward pass."""
    image, text = (x.detach() for x in pairs(max(rows, columns), dim, dtype, device))
    image, text = image[:rows], text[:columns]
    shared: dict[str, Any] = {
        "image": image, "text": text, "logit_scale": torch.tensor(SCALE, device=device), "image_ids": None,
        "text_ids": None, "first_text": 0, "ignore": False,
    }  # fmt: skip
    unranked: dict[str, Any] = dict.fromkeys(("image_best", "image_index", "text_best", "text_index"))
    forward, backend = BlockArguments(**shared, smooth=False, **unranked), resolve(None)
    image_sums, text_sums = BLOCK(forward, backend)[:2]
    backward = BackwardArguments(
        **shared,
        ranked=False,
        label_smoothing=0.0,
        middle=0.0,
        image_state=image_sums[: CLASSES + 1].contiguous(),
        text_state=text_sums[: CLASSES + 1].contiguous(),
        grad_image_loss=torch.full_like(image_sums[0], 0.5 / rows),
        grad_text_loss=torch.full_like(text_sums[0], 0.5 / columns),
        need_image=True,
        need_text=True,
        need_logit_scale=True,
    )
    return lambda: BLOCK(forward, backend), lambda: BACKWARD(backward, backend)


def _message(size: int, group: dist.ProcessGroup) -> Callable[[], Any]:
    """Returns a call that sends so many bytes to the next rank of the group, and receives as many."""
    ring = Group(check_group(group), "plan")
    sent, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    return lambda: ring.exchange([sent], [received]).wait()


def _together(run: Callable[[], Any], device: str, group: dist.ProcessGroup | None) -> Took:
    """Returns the time of one call, while the group's other ranks make the same calls."""
    run()
    calls = torch.tensor([max(1, int(_LEAST / time_once(run, device)))])
    if group is not None:
        dist.all_reduce(calls, dist.ReduceOp.MAX, group=group)
    repeats = int(calls)
    begin, busy = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return Took((time.perf_counter() - begin) / repeats, (time.process_time() - busy) / repeats)
