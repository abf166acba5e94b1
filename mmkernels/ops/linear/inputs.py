"""Argument checks that the linear ops share, and their arguments in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mmkernels.ops.linear.formula import IGNORED
from mmkernels.runtime.checks import autocast, autocast_dtype, can_look, check_floating, check_number, check_tensor
from mmkernels.runtime.group import check_group, told_to_group

_LEAST = 1e-30
"""The least softcap and temperature: float32 holds them, and 1 over them."""

Made = TypeVar("Made")


class Names(NamedTuple):
    """What the public function calls its arguments."""

    hidden: str = "hidden"
    weight: str = "weight"
    bias: str = "bias"


class Head(NamedTuple):
    """The leading fields of the ops' records."""

    hidden: Tensor  # [T, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]


def checked_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, names: Names, least: int = 1) -> Head:
    """Returns the tensors of a head, rows in one dim; raises unless they fit each other.

    Args:
        least: the tokens that there must be.
    """
    hidden, weight = autocast(hidden, weight)
    check_floating(names.hidden, hidden)
    check_tensor(names.weight, weight)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"{names.hidden} must be [..., d] with at least one channel, got shape {tuple(hidden.shape)}")
    dim = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != dim or weight.shape[0] < least:
        raise ValueError(
            f"{names.weight} must be [V, {dim}], a row of {names.hidden}'s channels for each token, and have a token; "
            f"got shape {tuple(weight.shape)}"
        )
    _check_like(names.weight, weight, hidden, names, (hidden.dtype,))
    if bias is not None:
        check_tensor(names.bias, bias)
        if autocast_dtype(hidden) is not None and bias.dtype in (torch.float16, torch.bfloat16):
            bias = bias.float()
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{names.bias} must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
        _check_like(names.bias, bias, hidden, names, (hidden.dtype, torch.float32))
    return Head(hidden.reshape(-1, dim), weight, bias)


def _check_like(name: str, x: Tensor, hidden: Tensor, names: Names, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        or_wide = " or float32" if len(set(dtypes)) > 1 else ""
        raise TypeError(f"{name} must have {names.hidden}'s dtype {hidden.dtype}{or_wide}, got {x.dtype}")
    if not (x.is_cpu and hidden.is_cpu) and x.device != hidden.device:
        raise ValueError(f"{name} must be on {names.hidden}'s device {hidden.device}, got {x.device}")


def checked_target(
    target: Tensor, hidden: Tensor, ignore_index: object, names: Names, vocabulary: int | None
) -> Tensor:
    """Returns int64 [T], `IGNORED` where the row takes no part; every other negative target becomes ``2**62``.

    Args:
        hidden: as the user passed it, [..., d].
        vocabulary: below which targets must be; None: not known.
    """
    ignore_index = checked_ignore_index(ignore_index)
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must be {list(hidden.shape[:-1])}, a token for each row of {names.hidden}, got shape "
            f"{tuple(target.shape)}"
        )
    if not (target.is_cpu and hidden.is_cpu) and target.device != hidden.device:
        raise ValueError(f"target must be on {names.hidden}'s device {hidden.device}, got {target.device}")
    ignored = target == ignore_index
    if target.is_cpu and can_look(target) and target.numel():
        _check_tokens(target, ignored, ignore_index, vocabulary)
    outside = target < 0
    return target.masked_fill(outside, 2**62).masked_fill(ignored, IGNORED).reshape(-1)


def _check_tokens(target: Tensor, ignored: Tensor, ignore_index: int, vocabulary: int | None) -> None:
    bad = (target < 0) & ~ignored if vocabulary is None else ((target < 0) | (target >= vocabulary)) & ~ignored
    if bool(bad.any()):
        place = [int(x) for x in bad.nonzero()[0]]
        most = "" if vocabulary is None else f" to {vocabulary - 1}"
        got = int(target[tuple(place)])
        raise ValueError(f"target{place} must be a token, from 0{most}, or ignore_index {ignore_index}, got {got}")


def checked_ignore_index(ignore_index: object) -> int:
    """Returns ignore_index; raises unless a target may be so."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int that int64 holds, got {ignore_index}")
    return ignore_index


def checked_cap(softcap: object) -> float:
    """Returns what the ops' records have for `softcap`, a positive number or None."""
    return 0.0 if softcap is None else check_number("softcap", softcap, "a positive number or None", least=_LEAST)


def checked_temperature(temperature: object) -> float:
    return check_number("temperature", temperature, "a positive number", least=_LEAST)


def told(make: Callable[[str], Made], group: Any, call: str, hidden: object) -> Made:
    """Returns ``make(the group's name)``; the other ranks hear of an error in it.

    Args:
        group: or None, whose name is "".
        hidden: whose device is that of the call, if it is a tensor.
    """
    if group is None:
        return make("")
    name = check_group(group)
    try:
        made = make(name)
        if isinstance(hidden, Tensor):
            check_group(group, hidden.device)
        return made
    except Exception as error:  # of any kind: the other ranks wait
        told_to_group(error, name, call, hidden)
        raise
