"""What the ranks of `test_patch_wrappers` run: data-parallel training of a patched model and of one that is not."""

from __future__ import annotations

from typing import Any

import torch
from patched_models import TEXT, labels, llama
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmkernels
from mmkernels.integrations.patching import deferred

deferred.LEAST_LOGITS = 0  # these models are small


def _part(rank: int) -> dict[str, Tensor]:
    return {name: x[rank : rank + 1] for name, x in (TEXT | {"labels": labels()}).items()}


def _step(model: Any, rank: int) -> dict[str, Tensor]:
    """Returns the loss and the gradients of this rank's row, whole."""
    loss = model(**_part(rank)).loss
    loss.backward()
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
    found = {name: whole(x.grad).clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found | {"loss": loss.detach()}


def ddp(rank: int) -> bool:
    """Wrapped after `patch`, and patched after it was wrapped."""
    expected = _step(DistributedDataParallel(llama()), rank)
    before, after = llama(), DistributedDataParallel(llama())
    mmkernels.patch(before, verbose=False)
    mmkernels.patch(after, verbose=False)
    for model in (DistributedDataParallel(before), after):
        torch.testing.assert_close(_step(model, rank), expected, rtol=1e-4, atol=1e-5)
    return True


def _sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2(rank: int) -> str:
    """Sharded after `patch` and before. Returns what `unpatch` says where a changed module was sharded itself."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    assert mesh.size() == 2
    expected = _step(_sharded(llama()), rank)
    before, after = llama(), _sharded(llama())
    mmkernels.patch(before, verbose=False)
    mmkernels.patch(after, verbose=False)
    for model in (_sharded(before), after):
        torch.testing.assert_close(_step(model, rank), expected, rtol=1e-4, atol=1e-5)
        mmkernels.patch(model, verbose=False)  # nothing new
        mmkernels.unpatch(model, verbose=False)
        torch.testing.assert_close(_step(model, rank), expected, rtol=1e-4, atol=1e-5)
    model = llama()
    mmkernels.patch(model, verbose=False)
    fully_shard(model.lm_head)
    mmkernels.patch(model, verbose=False)
    try:
        mmkernels.unpatch(model, verbose=False)
    except RuntimeError as error:
        return str(error)
    return ""
