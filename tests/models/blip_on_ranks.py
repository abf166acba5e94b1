"""What each rank does in the test of `BLIPPretraining` on ranks; see `ranks.run`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels.models import BLIP, BLIPPretraining


def trained(pretraining: BLIPPretraining, module: nn.Module, rank: int | None) -> dict[str, Any]:
    """Returns what two steps of the contrastive loss on 4 pairs lead to; `rank`: the half of the pairs, None: all."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 128, (2, 4, 6), generator=generator)
    pixels = torch.rand(2, 4, 3, 32, 32, generator=generator, dtype=torch.float64)
    about = torch.tensor([[0, 1, 2, 0], [3, 0, 4, 5]])
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    optimizer = torch.optim.SGD(pretraining.model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        loss: Tensor = module(ids[step, rows], pixels[step, rows], ids=about[step, rows]).contrastive
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pretraining.update()
        losses.append(loss.item())
    queue = pretraining.texts
    assert queue.ids is not None and queue.ids.tolist() == about.flatten().tolist()
    weights = torch.cat([x.detach().flatten() for x in (*pretraining.parameters(), queue.features)])
    return {"losses": losses, "weights": weights}


def made(**options: Any) -> BLIPPretraining:
    model = BLIP.from_size("tiny", dtype=torch.float64, vision_layers=1, text_layers=1)
    return BLIPPretraining(model, queue_size=9, decay=0.5, ids=True, **options)


def as_one_process(rank: int) -> dict[str, float]:
    """Returns how far the ranks are from one process with all pairs."""
    pretraining = made(group=dist.group.WORLD)
    module = DistributedDataParallel(pretraining, find_unused_parameters=True)
    found, one = trained(pretraining, module, rank), made()
    expected = trained(one, one, None)
    away = float((found["weights"] - expected["weights"]).norm() / expected["weights"].norm())
    return {
        "losses": max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
        "weights": away,
    }
