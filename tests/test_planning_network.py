"""The ring between two hosts whose link is limited, beside the plan."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import two_hosts


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
