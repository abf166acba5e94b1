"""What `CachedContrastive` needs of DDP and FSDP2: passes without communication, then one average of all gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels.runtime.group import Group, check_group

_CALL = "CachedContrastive"


class DataParallel:
    """The DDP and FSDP2 wrappers, and the synchronised batch norms, among some modules and their submodules.

    Args:
        modules: where to look; a wrapper that is found twice counts once.

    Raises:
        ValueError: a module of FSDP1, or a DDP module with a static graph.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = list(dict.fromkeys(child for module in modules for child in module.modules()))
        self.ddp = [x for x in found if isinstance(x, DistributedDataParallel)]
        self.fsdp: list[Any] = []
        norms = [x for x in found if isinstance(x, nn.SyncBatchNorm)]
        if dist.is_available():
            from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # imports much: not with the module

            self.fsdp = [x for x in found if isinstance(x, FSDPModule)]
            if any(isinstance(x, FullyShardedDataParallel) for x in found):
                raise ValueError("modules must use fully_shard (FSDP2), got a FullyShardedDataParallel (FSDP1)")
        if any(x.static_graph for x in self.ddp):
            raise ValueError(
                "static_graph must be False, as PyTorch counts the passes of a step, which has many here; got a "
                "DistributedDataParallel with static_graph=True"
            )
        self.reshard()
        meshes = [x.device_mesh for module in self.fsdp for x in module.parameters() if hasattr(x, "device_mesh")]
        in_step = [group for mesh in dict.fromkeys(meshes) for group in mesh.get_all_groups()]
        if norms and dist.is_available() and dist.is_initialized():
            in_step += [dist.group.WORLD if x.process_group is None else x.process_group for x in norms]
        self._in_step, self._agreed = list(dict.fromkeys(in_step)), False
        self._averaging = list(dict.fromkeys(x.process_group for x in self.ddp)) if torch.is_grad_enabled() else []

    def reshard(self) -> None:
        """Shards FSDP2's parameters, of which a pass without a backward pass leaves the outermost module's gathered."""
        for x in self.fsdp:
            x.reshard()

    @contextmanager
    def local(self) -> Iterator[None]:
        """DDP does not communicate within: neither gradients, nor buffers before a pass.

        `average` then broadcasts buffers, once a step, also of a module whose methods are the encoders, without DDP.
        """
        before = [(x.require_backward_grad_sync, x.require_forward_param_sync) for x in self.ddp]
        for x in self.ddp:
            x.require_backward_grad_sync = x.require_forward_param_sync = False
        try:
            yield
        finally:
            for x, (backward, forward) in zip(self.ddp, before, strict=True):
                x.require_backward_grad_sync, x.require_forward_param_sync = backward, forward

    def reduce_next(self, wanted: bool) -> None:
        """Says whether FSDP2 reduces gradients in the next backward pass; without it they are kept unsharded."""
        for x in self.fsdp:
            x.set_requires_gradient_sync(wanted, recurse=False)

    def average(self) -> None:
        """Averages the gradients of each DDP module over its ranks, unless the caller is within its ``no_sync``."""
        for x in self.ddp:
            if x.require_backward_grad_sync:
                _average(x)

    def agree(self, counts: list[int]) -> list[int]:
        """Returns the largest counts among the ranks that must make the same number of passes.

        These are the ranks of FSDP2's meshes and of synchronised batch norms: they communicate in each pass.

        Raises:
            ValueError: another rank has reported an error, or has another number of encoders.
        """
        self._agreed = True
        for group in self._in_step:
            said = Group(check_group(group), _CALL).agree({"encoders": len(counts)}, {"chunks": counts})
            counts = [max(x) for x in zip(*(y["chunks"] for y in said), strict=True)]
        return counts

    def confirm(self) -> None:
        """Waits until all ranks of DDP modules have come here too, if gradients will be averaged.

        Raises:
            ValueError: one of them has reported an error instead.
        """
        for group in self._averaging:
            Group(check_group(group), _CALL).agree({}, {})

    def report(self, error: Exception) -> None:
        """Tells an error to the ranks that wait in `agree` or `confirm`, for the first of the groups.

        After `agree` those that communicate in each pass wait in a pass, where they can't be told.
        """
        waiting = self._averaging if not self._in_step else [] if self._agreed else self._in_step
        if waiting:
            Group(check_group(waiting[0]), _CALL).report(error)


class _Zero(nn.Module):
    """Returns 0, and passes a gradient of 0 to some parameters of a module, in whose place it stands in DDP."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._stands_for = (module, parameters)  # in a tuple neither is registered as its own
        tables = [x for x in module.modules() if isinstance(x, nn.Embedding | nn.EmbeddingBag)]
        self._sparse = {id(x.weight) for x in tables if x.sparse}  # of which DDP expects sparse gradients

    def forward(self, _: Tensor) -> Tensor:
        return 0 * sum(self._one(x).sum() for x in self._stands_for[1])  # type: ignore[return-value]

    def _one(self, x: Tensor) -> Tensor:
        if id(x) not in self._sparse:
            return x
        return F.embedding(torch.zeros(1, dtype=torch.int64, device=x.device), x, sparse=True)

    def named_buffers(self, *args: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        """Yields the module's, as DDP looks them up anew before it broadcasts them."""
        return self._stands_for[0].named_buffers(*args, **options)


def _average(ddp: DistributedDataParallel) -> None:
    """Runs a pass through a DDP module that adds 0 to every gradient, so that DDP averages what has accumulated.

    DDP averages the gradients of a pass only where every parameter takes part in it. After passes of several encoders
    the last one says nothing of the others' parameters (two towers in one module, a temperature that only the loss
    uses), and a rank without rows has made none. With `find_unused_parameters`, a parameter without a gradient stays
    out, so that one that no rank uses keeps none.
    """
    ignored = getattr(ddp, "parameters_to_ignore", ())
    trained = [x for name, x in ddp.module.named_parameters() if x.requires_grad and name not in ignored]
    if ddp.find_unused_parameters:
        trained = [x for x in trained if x.grad is not None] or trained[:1]
    module, ddp.module = ddp.module, _Zero(ddp.module, trained)
    try:
        zero = ddp.forward(torch.zeros(()))
    finally:
        ddp.module = module
    zero.backward()
