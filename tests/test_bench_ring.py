"""What ``mmkernels bench ring`` runs on each rank: its check finds wrong results, its peers compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import ring_peers
import torch
import torch.distributed as dist
from ring_peers import GATHER, GATHER_LOCAL, ONE

from mmkernels import info_nce
from mmkernels.planning.processes import on_ranks
from mmkernels.targets import OURS


def on_rank(wrong: bool) -> dict[str, Any]:
    """Returns what the benchmark measures on one rank of a small batch; where asked for, of half of the pairs."""
    if wrong:
        ring_peers.ring = lambda image, text, scale: info_nce(image, text, scale, group=_alone())
    return ring_peers.measure_beside(32, 16, "fp32", 2, 1)


def _alone() -> dist.ProcessGroup:
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def test_both_ranks_measure() -> None:
    for rank, found in enumerate(on_ranks(2, on_rank, False, timeout=60.0)):
        assert found["wrong"] is None
        assert found["seconds"].keys() == found["memory"].keys() == {OURS, GATHER, GATHER_LOCAL}
        assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
        assert len(found["cpu"][ONE]) == (2 if rank == 0 else 0)


def test_both_ranks_measure_the_ring_alone() -> None:
    for found in on_ranks(2, ring_peers.measure_alone, 32, 16, "fp32", timeout=60.0):
        assert found["wrong"] is None and found["seconds"][OURS][0] > 0 and found["memory"][OURS] >= 1


def test_a_wrong_loss_is_found() -> None:
    found = on_ranks(2, on_rank, True, timeout=60.0)
    assert all(of_rank["wrong"].startswith("loss: largest error") for of_rank in found)


def losses_of_peers() -> list[tuple[float, list[torch.Tensor]]]:
    """Returns each peer's loss, and the gradients that a rank gets."""
    image, text, scale = ring_peers._leaves(dist.get_rank(), 8, 16, "fp32")
    found = []
    for loss in (ring_peers.ring, ring_peers.gather, ring_peers.gather_local):
        value = loss(image, text, scale)
        found.append((value.item(), list(torch.autograd.grad(value, (image, text)))))
    return found


def test_the_peers_gradients_are_those_of_the_ring() -> None:
    for ours, gather, local in on_ranks(2, losses_of_peers, timeout=60.0):
        assert gather[0] == pytest.approx(ours[0], rel=1e-5)
        for found in (gather, local):
            for x, y in zip(found[1], ours[1], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
