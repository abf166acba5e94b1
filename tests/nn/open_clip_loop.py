"""open_clip's own training loop, run with its losses and with ours; see `ranks.run`."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip_loss import open_clip
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmkernels.nn

OPTIONS: dict[str, dict[str, Any]] = {
    "no options": {},
    "gather": {"local_loss": True, "gather_with_grad": True, "bias": True},
    "accumulated": {"local_loss": True, "gather_with_grad": True, "accum_freq": 2},
    "siglip": {"siglip": True},
    "siglip, accumulated": {"siglip": True, "accum_freq": 2},
}
ROWS, BATCHES = 6, 4


class Model(nn.Module):
    """What open_clip's models return in training."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(10, 16), nn.EmbeddingBag(50, 16)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if bias else None

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        found = {
            "image_features": F.normalize(self.image(image), dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        return found if self.logit_bias is None else {**found, "logit_bias": self.logit_bias}


class Batches(list[Any]):
    """A data loader, and what holds one."""

    num_batches, num_samples = BATCHES, ROWS * BATCHES

    @property
    def dataloader(self) -> Batches:
        return self

    def set_epoch(self, _: int) -> None:
        """Each has the same batches."""


def trained(rank: int, world: int) -> dict[str, float]:
    """Returns by how much the weights after an epoch differ at most, relative to how far they moved."""
    loop, found = _loop(), {}
    for name, options in OPTIONS.items():
        state = [_state(loop, losses, rank, world, **options) for losses in (open_clip(), mmkernels.nn)]
        before = Model("logit_bias" in state[0]).state_dict()
        apart = max(float((x - y).abs().max()) for x, y in zip(*(x.values() for x in state), strict=True))
        moved = {key: float((x - before[key]).abs().max()) for key, x in state[0].items()}
        assert all(x > 1e-3 for key, x in moved.items() if key != "logit_bias" or "siglip" in name), moved
        found[name] = apart / max(moved.values())
    return found


def _state(
    loop: ModuleType, losses: Any, rank: int, world: int, bias: bool = False, siglip: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Returns the weights after an epoch."""
    sharing = {"local_loss": False, "gather_with_grad": False, "accum_freq": 1, **options}
    ranks = {"rank": rank, "world_size": world}
    if siglip:  # as open_clip's `create_loss` has it
        loss = losses.SigLipLoss(**ranks, dist_impl=None)
    else:
        chosen = {key: sharing[key] for key in ("local_loss", "gather_with_grad")}
        loss = losses.ClipLoss(**chosen, cache_labels=True, **ranks, use_horovod=False)
    arguments = SimpleNamespace(
        **sharing, **ranks, device="cpu", precision="fp32", batch_size=ROWS, distributed=True, local_rank=rank,
        distill=False, horovod=False, skip_scheduler=True, grad_clip_norm=1.0, wandb=False, log_every_n_steps=100,
        log_local=False,
    )  # fmt: skip
    model, draw = Model(bias or siglip), torch.Generator().manual_seed(rank)
    data = Batches(
        (torch.randn(ROWS, 10, generator=draw), torch.randint(50, (ROWS, 4), generator=draw)) for _ in range(BATCHES)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loop.train_one_epoch(
        DistributedDataParallel(model), {"train": data}, loss, 0, optimizer, None, None, None, arguments
    )
    return model.state_dict()


def _loop() -> ModuleType:
    """Returns the module of the loop, alone: of the packages around it, it needs three names here."""
    folder = open_clip().__file__
    assert folder is not None
    release = folder.rpartition("/open_clip/")[0]
    around: dict[str, dict[str, Any]] = {
        "open_clip": {"get_input_dtype": lambda precision: None, "CLIP": nn.Module, "CustomTextCLIP": nn.Module},
        "open_clip_train": {"__path__": [f"{release}/open_clip_train"]},
        "open_clip_train.zero_shot": {"zero_shot_eval": None},
    }
    for name, values in around.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(values)
    return importlib.import_module("open_clip_train.train")
