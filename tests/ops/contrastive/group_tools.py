"""Cases of the contrastive ops shared out to ranks, and their results put together again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from harness import SPECS, Result, cotangent, flatten, inputs_in, leaves_of
from torch import Tensor

from mmkernels.ops.contrastive import ring
from mmkernels.spec import Case, Inputs, OpSpec

_SIDES = {"image": "image", "image_ids": "image", "text": "text", "text_ids": "text"}
_SIDES |= {"query": "image", "target": "image", "gallery": "text"}
"""Which rows an input has; all others every rank has whole."""


class Job(NamedTuple):
    """A case of an op that ranks compute together."""

    op: str
    case: str
    dtype: torch.dtype
    backend: str


class Part(NamedTuple):
    """What one rank returns: of outputs and gradients that have rows, its own rows."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]


def case_of(job: Job) -> tuple[OpSpec, Case]:
    spec = SPECS[job.op]
    return spec, next(case for case in spec.cases if case.id == job.case)


def rows_of(job: Job, inputs: Inputs, rank: int, world: int) -> dict[str, slice]:
    """Returns this rank's images and texts: uneven shares, some of them empty, which differ from case to case."""
    first, second = ("query", "gallery") if "query" in inputs else ("image", "text")
    sizes = {"image": len(inputs[first]), "text": len(inputs[second])}
    generator = torch.Generator().manual_seed(zlib.crc32(f"{job.case}{world}".encode()))
    places = torch.rand(world - 1, generator=generator).sort().values
    if world > 2:
        places[1] = places[0]  # rank 1 has none
    cuts = {side: [0, *(round(float(x) * n) for x in places), n] for side, n in sizes.items()}
    by_ids = inputs.get("text_ids") is not None and inputs.get("same_id") != "ignore"
    if by_ids or "query" in inputs:  # texts are shared out in another way
        cuts["text"] = [sizes["text"] - x for x in reversed(cuts["text"])]
    return {side: slice(*x[rank : rank + 2]) for side, x in cuts.items()}


@contextmanager
def small_pieces(rows: int, chunk: int) -> Iterator[None]:
    """Let texts travel in pieces of so many rows, and blocks take so many images at once."""
    sizes = {ring.PIECE_BYTES: rows, ring.CHUNK_BYTES: chunk}
    with mock.patch.object(ring, "rows_within", lambda budget, *_: sizes[budget]):
        yield


def compute(rank: int, world: int, jobs: list[Job]) -> list[Part]:
    """Returns the results of one rank."""
    torch.set_num_threads(1)
    return [_part(job, rank, world) for job in jobs]


def compute_in_pieces(rank: int, world: int, jobs: list[Job]) -> list[Part]:
    """Returns the results of one rank, its texts and images in about two pieces and three chunks."""
    parts = []
    for job in jobs:
        inputs = inputs_in(*case_of(job), job.dtype)
        images, texts = (inputs[name] for name in (("query", "gallery") if "query" in inputs else ("image", "text")))
        with small_pieces(1 + len(texts) // (2 * world), 1 + len(images) // (3 * world)):
            parts.append(_part(job, rank, world))
    return parts


def _part(job: Job, rank: int, world: int) -> Part:
    spec, case = case_of(job)
    inputs = inputs_in(spec, case, job.dtype)
    rows = rows_of(job, inputs, rank, world)
    mine = {name: x[rows[_SIDES[name]]] if name in _SIDES else x for name, x in inputs.items()}
    mine = leaves_of(case, mine)
    outputs = flatten(spec.function(**mine, group=dist.group.WORLD, backend=job.backend))
    grads: dict[str, Tensor] = {}
    flowing = [(n, x) for n, x in enumerate(outputs) if x.requires_grad]
    if flowing:
        flows = [cotangent(x) if x.dim() == 0 else _rows_cotangent(n, x, rows, inputs) for n, x in flowing]
        leaves = [mine[name] for name in case.grads]
        found = torch.autograd.grad([x for _, x in flowing], leaves, flows)
        grads = dict(zip(case.grads, found, strict=True))
    return Part([x.detach() for x in outputs], grads)


def _rows_cotangent(place: int, x: Tensor, rows: dict[str, slice], inputs: Inputs) -> Tensor:
    """Returns the rows of the direction that one process would take for the losses of all images, or of all texts."""
    side = ("image", "text")[place]
    return cotangent(x.new_empty(len(inputs[side])))[rows[side]]


def together(case: Case, inputs: Inputs, parts: list[Part]) -> Result:
    """Returns what one process returns, of what the ranks returned; asserts that they agree in what they share."""
    world, by_rows = len(parts), inputs.get("reduction") == "none" or "query" in inputs
    outputs = []
    for some in zip(*(part.outputs for part in parts), strict=True):
        if some[0].dim() == 0:
            assert all(torch.equal(x, some[0]) or bool(x.isnan() & some[0].isnan()) for x in some), "ranks differ"
            outputs.append(some[0])
        else:
            outputs.append(torch.cat(some))
    # Ranks get the gradients of the sum over ranks of what they return: of a loss for all, world times its own.
    features = 1 if by_rows else world
    grads = {}
    for name in case.grads:
        some = [part.grads[name].double() for part in parts]
        if name in _SIDES:
            grads[name] = torch.cat(some) / features
        elif name == "hard_texts":  # all ranks have the same ones, and each sees what its own images add
            grads[name] = torch.stack(some).sum(0) / features
        else:
            assert all(torch.equal(x, some[0]) for x in some), "ranks differ"
            grads[name] = some[0] * (world if by_rows else 1)
    return Result(tuple(outputs), grads)
