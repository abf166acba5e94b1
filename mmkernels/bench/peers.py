"""What an op is measured beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from mmkernels.machine import memory_of
from mmkernels.spec import Inputs

Call = Callable[[], Any]

MOST_MEMORY = 0.5
"""The share of a device's memory that a peer may take: one that leaves the others no room disturbs their times."""


class CantRunError(Exception):
    """A peer can't compute this row; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Another way to compute what an op computes.

    Args:
        name: in tables and JSON.
        prepare: takes the op's keyword arguments, those to differentiate by with ``requires_grad``; returns the call to
            time. What a user does once for many calls, such as building a mask or compiling, is done here, untimed.
            Raises `CantRunError`.
        slow: it takes many seconds to prepare or to run: left out of quick rows.
        device: the only type of device that it is measured on; "": any.
        checked: its result must be the op's. False: of a measure, such as a copy of the inputs, and of the definition,
            in which near ties may be decided otherwise in a narrow dtype.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    slow: bool = False
    device: str = ""
    checked: bool = True


def check_room(least: float, device: torch.device | str) -> None:
    """Raises `CantRunError` where `least` bytes are more than a peer may take of a CPU's memory.

    A GPU reports that its memory is exhausted; on a CPU the process would be killed.
    """
    device = torch.device(device)
    if device.type == "cpu" and least > MOST_MEMORY * memory_of(device):
        raise CantRunError(f"would take {least / 1e9:.0f} GB or more of {memory_of(device) / 1e9:.0f} GB: left out")


def compiled(function: Callable[..., Any], *args: Any, **options: Any) -> Call:
    """Returns the call of a function by ``torch.compile``, compiled for these arguments.

    Raises:
        CantRunError: it does not compile here.
    """
    try:
        call = partial(_compile(function), *args, **options)
        call()
    except Exception as error:  # of any kind: no compiler, no support for a dtype or a shape
        raise CantRunError(f"does not compile here: {type(error).__name__}: {first_line(error)}") from error
    return call


@cache
def _compile(function: Callable[..., Any]) -> Any:
    torch._dynamo.config.recompile_limit = 256  # one for each configuration and dtype
    return torch.compile(function, dynamic=False)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")
