"""The ring between two hosts whose link is limited, beside the plan."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_hosts

from mmkernels.planning.measure import curves, memory_for, pairs, sample_blocks, sample_ring, step_on
from mmkernels.planning.model import Took, predict
from mmkernels.planning.ring import Step, sent_bytes
from mmkernels.runtime import host


@pytest.fixture(autouse=True, scope="module")
def _permitted() -> None:
    reason = two_hosts.why_not()
    if reason is not None:
        pytest.skip(reason)


def sent_at(link: two_hosts.Link | None, rates: list[float], size: int) -> list[float]:
    """Returns the bytes a second that reach the other host, by limit of the link."""
    found = []
    for rate in rates:
        if link is not None:
            link.limit(rate)
        dist.barrier()
        data = torch.zeros(size, dtype=torch.uint8)
        begin = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(data, 1)
        else:
            dist.recv(data, 0)
        dist.barrier()
        found.append(size / (time.perf_counter() - begin))
    return found


@pytest.mark.slow
def test_the_link_is_no_faster_than_its_limit() -> None:
    rates = [4e6, 40e6]
    slow, fast = two_hosts.run(f"{__name__}:sent_at", rates, 4_000_000, timeout=120)
    assert slow < 1.1 * rates[0] and slow < fast < 1.1 * rates[1], (slow, fast)


STEP = Step(4096, 256, 2, "fp32")
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
ROUNDS = 5


def steps_at(link: two_hosts.Link | None, shares: list[float]) -> dict[str, Any]:
    """Returns what the plan stands on, and the time of a step by limit of the link, the first of which is none.

    Args:
        shares: the time that the step's bytes take on the wire, of the time of a step where the link has no limit.
    """
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    alone = [dist.new_group([member]) for member in range(2)][rank]
    run = step_on(*pairs(STEP.rows, STEP.dim, STEP.dtype, seed=rank), group)
    run()
    agreed = torch.tensor([statistics.median(_seconds(run) for _ in range(3))])
    dist.broadcast(agreed, 0)
    rates = [None, *(sent_bytes(STEP) / (share * float(agreed)) for share in shares)]
    samples, times = [], [[] for _ in rates]
    for _ in range(ROUNDS):  # all in the same noise
        for at, rate in zip(times, rates, strict=True):
            if link is not None:
                link.limit(rate)
            if rate is None:
                ours = sample_blocks(STEP.dim, STEP.dtype, "cpu", group)
                ours |= sample_ring(STEP.dim, STEP.dtype, group, alone)
                samples.append([[*what, *took] for what, took in ours.items()])
            at.append(_seconds(run))
    return {"samples": samples, "steps": [(rate, statistics.median(at)) for rate, at in zip(rates, times, strict=True)]}


def _seconds(run: Any) -> float:
    dist.barrier()
    begin = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - begin


@pytest.mark.slow
def test_the_wire_is_hidden_until_it_binds() -> None:
    found = two_hosts.run(f"{__name__}:steps_at", SHARES, timeout=600)
    samples = [{(name, size): Took(*took) for name, size, *took in one} for one in found["samples"]]
    sharing = max(1.0, STEP.ranks / host.physical_cores())
    rows = []
    for rate, seconds in found["steps"]:
        rows.append((rate, seconds, predict(STEP, curves(samples, sharing, memory_for(2), rate)).seconds))
    print("\nMB/s   step, ms   predicted")
    for rate, seconds, predicted in rows:
        limit = "none" if rate is None else f"{rate / 1e6:.0f}"
        print(f"{limit:>4} {seconds * 1e3:10.0f} {predicted * 1e3:11.0f} {predicted / seconds - 1:+.0%}")
    # What holds on a busy machine too; how well the plan predicts is for a reader. The bytes take a step's time on the
    # wire in the fourth row, so that a ring that waited for them would take two. No step is faster than its wire.
    free, equal = rows[0][1], rows[3][1]
    assert equal < 1.75 * free
    assert all(seconds > 0.9 * sent_bytes(STEP) / rate for rate, seconds, _ in rows[1:])
