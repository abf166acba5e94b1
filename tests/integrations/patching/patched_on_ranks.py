"""What the ranks of `test_patch_wrappers` run: data-parallel training of a patched model and of one that is not."""

from __future__ import annotations

import functools
from typing import Any

import torch
from patched_models import TEXT, labels, llama
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
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


def fsdp1(rank: int) -> bool:
    """The output layer is a unit of its own, so that its weight is freed before the loss is computed."""

    def losses(model: Any, originals: bool) -> tuple[float, float]:
        units = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module is model.lm_head)
        cpu = torch.device("cpu")
        whole = FullyShardedDataParallel(model, auto_wrap_policy=units, use_orig_params=originals, device_id=cpu)
        loss = whole(**_part(rank)).loss
        loss.backward()
        return float(loss.detach()), float(whole.clip_grad_norm_(1e9))

    for originals in (False, True):
        patched = llama()
        mmkernels.patch(patched, verbose=False)
        torch.testing.assert_close(losses(patched, originals), losses(llama(), originals), rtol=1e-4, atol=1e-5)
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
