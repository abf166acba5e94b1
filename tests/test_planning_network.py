"""The ring between two hosts whose link is limited, beside the plan."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_hosts

from mmkernels.planning.check import step_on
from mmkernels.planning.measure import curves, sample
from mmkernels.planning.model import predict
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


def test_the_link_is_as_slow_as_its_limit() -> None:
    rates = [4e6, 40e6]
    found = two_hosts.run(f"{__name__}:sent_at", rates, 4_000_000, timeout=120)
    for limit, rate in zip(rates, found, strict=True):
        assert 0.7 * limit < rate < 1.1 * limit, found


STEP = Step(4096, 256, 2, "fp32")
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
ROUNDS = 5


def steps_at(link: two_hosts.Link | None, shares: list[float]) -> dict[str, Any]:
    """Returns what the plan stands on, and the time of a step by limit of the link.

    Args:
        shares: the time that the step's bytes take on the wire, of the time of a step where the link has no limit.
    """
    group = dist.group.WORLD
    run = step_on(STEP, group)
    samples, unlimited = [], []
    for _ in range(ROUNDS):
        samples.append([[*what, seconds] for what, seconds in sample(STEP.dim, STEP.dtype, "cpu", group).items()])
        unlimited.append(_seconds(run))
    agreed = torch.tensor([statistics.median(unlimited)])
    dist.broadcast(agreed, 0)
    steps = []
    for share in shares:
        rate = sent_bytes(STEP) / (share * float(agreed))
        if link is not None:
            link.limit(rate)
        steps.append((rate, statistics.median(_seconds(run) for _ in range(ROUNDS))))
    return {"samples": samples, "unlimited": float(agreed), "steps": steps}


def _seconds(run: Any) -> float:
    dist.barrier()
    begin = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - begin


@pytest.mark.slow
def test_the_wire_is_hidden_until_it_binds_as_the_plan_says() -> None:
    found = two_hosts.run(f"{__name__}:steps_at", SHARES, timeout=600)
    samples = [{(name, size): seconds for name, size, seconds in one} for one in found["samples"]]
    sharing = max(1.0, STEP.ranks / host.physical_cores())
    rows = []
    for rate, seconds in found["steps"]:
        rows.append((rate, seconds, predict(STEP, curves(samples, sharing, 2, rate)).seconds))
    print("\nMB/s   step, ms   predicted")
    for rate, seconds, predicted in rows:
        print(f"{rate / 1e6:4.0f} {seconds * 1e3:10.0f} {predicted * 1e3:11.0f} {predicted / seconds - 1:+.0%}")
    hidden, bound = rows[0], rows[-1]
    assert hidden[1] < 1.3 * found["unlimited"]
    assert bound[1] > 0.8 * SHARES[-1] * found["unlimited"]
    assert all(0.7 < predicted / seconds < 1.3 for _, seconds, predicted in rows), rows
