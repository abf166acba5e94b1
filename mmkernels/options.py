"""What the commands' options share: names of dtypes and devices, lists, and the error for people."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "BadInput", "check_device", "one_of", "parse_list"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BadInput(ValueError):
    """Something that a user asked for can't be done; the message is one line, for people."""


def parse_list(text: str) -> tuple[str, ...]:
    """Returns the parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `BadInput` unless `value` is among the `known` ones."""
    if value not in known:
        raise BadInput(f"{name} must be one of {', '.join(known)}; got {value!r}")


def check_device(name: str) -> None:
    """Raises `BadInput` unless a tensor can be made on this device."""
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"--device must be cpu, cuda or cuda:<number>; got {name!r}")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"--device must be one that torch can use here, such as cpu; got {name!r}: {reason}") from None
