"""Chunks of an encoder's input, and a second pass over them that is the same as the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Encoder = Callable[..., Tensor]


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors of a tensor, tuple, list or mapping, which may be nested."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)


def rows_of(name: str, batch: Any) -> int:
    """Returns the number of rows of an encoder's input: the length of dim 0 of each of its tensors that has a dim."""
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(f"{name} must be a tensor, or a tuple, list or mapping of them, got {type(batch).__name__}")
    lengths = list(dict.fromkeys(x.shape[0] for x in tensors_of(batch) if x.dim()))
    if not lengths:
        raise ValueError(f"{name} must hold a tensor with a dim of rows, got none")
    if len(lengths) > 1:
        raise ValueError(f"{name} must hold tensors of as many rows, got {' and '.join(map(str, lengths))}")
    if any(x.requires_grad and not x.is_leaf for x in tensors_of(batch)):
        raise ValueError(f"{name} must not be the result of something differentiable: compute that in the encoder")
    return lengths[0]


def slice_rows(batch: Any, rows: slice) -> Any:
    """Returns these rows of every tensor that has a dim; other values are passed on as they are."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: slice_rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [slice_rows(value, rows) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else values
    return batch


def call(encoder: Encoder, batch: Any) -> Any:
    """Returns what an encoder gives for a tensor, or for a tuple's positional or a mapping's keyword arguments."""
    if isinstance(batch, Tensor):
        return encoder(batch)
    return encoder(**batch) if isinstance(batch, Mapping) else encoder(*batch)


def random_devices(modules: Iterable[nn.Module], batches: Iterable[Any]) -> list[torch.device]:
    """Returns the devices, other than the CPU, whose random numbers a pass may use."""
    found = [x.device for module in modules for x in module.parameters()]
    found += [x.device for batch in batches for x in tensors_of(batch)]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found.append(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    return [x for x in dict.fromkeys(found) if x.type not in ("cpu", "meta")]


class RandomState:
    """PyTorch's random numbers as they are now, on the CPU and on some devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {x: torch.get_device_module(x).get_rng_state(x) for x in devices}

    def _restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, random numbers are drawn from this state on; after it they continue as if none had been drawn."""
        now = RandomState(list(self._devices))
        self._restore()
        try:
            yield
        finally:
            now._restore()


@contextmanager
def running_statistics_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, batch and instance norms in training normalise by their batch, but don't count it in their averages."""
    counting = {
        child
        for module in modules
        for child in module.modules()
        if isinstance(child, _NormBase) and child.training and child.track_running_stats
    }
    for norm in counting:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in counting:
            norm.track_running_stats = True
