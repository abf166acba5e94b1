"""Checks that modules and models share. Each error names what an argument must be, and what it was."""

from __future__ import annotations

from torch import Tensor

from mmkernels.runtime.checks import check_tensor


def check_positive(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")


def check_features(name: str, x: Tensor, dim: int) -> None:
    check_tensor(name, x)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} must be [B, L, {dim}], got shape {tuple(x.shape)}")


def described(x: object) -> str:
    """Returns how an error describes an argument that must be a tensor: by its dtype, or its type if it is none."""
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def check_choice(name: str, choice: object, choices: tuple[object, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {choice!r}")


def check_width(x: Tensor, dim: int) -> None:
    """Raise unless x is packed or batched tokens of this width."""
    check_tensor("x", x)
    if x.dim() not in (2, 3) or x.shape[-1] != dim:
        raise ValueError(f"x must be [tokens, {dim}] or [images, tokens, {dim}], got shape {tuple(x.shape)}")
