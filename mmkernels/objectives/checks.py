"""Argument checks that the objectives share. Each error names what an argument must be, and what it was."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from mmkernels.runtime.checks import check_floating, check_tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], of: str) -> None:
    """Raise ValueError unless x has a shape, which is that of the argument `of`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)} as {of}, got shape {tuple(x.shape)}")


def check_token_ids(name: str, x: Tensor) -> None:
    """Raise unless x is integers ``[B, L]``."""
    check_integers(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must be [B, L], got shape {tuple(x.shape)}")


def check_integers(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {x.dtype}")


def checked_mask(name: str, x: Tensor, shape: tuple[int, ...], of: str) -> Tensor:
    """Returns a mask of bools or integers as bools; raises unless it is one, and has the shape of the argument `of`."""
    check_tensor(name, x)
    if x.dtype != torch.bool and x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be bool or integers, got {x.dtype}")
    check_shape(name, x, shape, of)
    return x.bool()


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def check_hidden(hidden: Tensor, ids: Tensor, of: str) -> None:
    """Raise unless hidden is floating ``[B, L, d]``, B and L those of the argument `of`."""
    check_floating("hidden", hidden)
    if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
        raise ValueError(f"hidden must be [{ids.shape[0]}, {ids.shape[1]}, d] as {of}, got shape {tuple(hidden.shape)}")


def check_pair_values(name: str, x: Tensor, other: Tensor | None = None, of: str = "") -> None:
    """Raise unless x is floating ``[B]``, and has the shape of the argument `of`, if that is given."""
    check_floating(name, x)
    if x.dim() != 1:
        raise ValueError(f"{name} must be [B], got shape {tuple(x.shape)}")
    if other is not None:
        check_shape(name, x, other.shape, of)
