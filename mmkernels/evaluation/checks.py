"""Argument checks that the metrics share. Each error names what an argument must be, and what it was."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmkernels.runtime.checks import check_number

Values: TypeAlias = "Sequence[float] | Sequence[bool] | NDArray[Any] | Tensor"
"""One number or bool for each answer, ``[N]``: a sequence, an array or a tensor on any device."""
Bools: TypeAlias = "NDArray[np.bool_]"
Floats: TypeAlias = "NDArray[np.float64]"
_PACKAGES = {"sklearn": "scikit-learn", "jsonschema": "jsonschema", "referencing": "jsonschema", "PIL": "Pillow"}
T = TypeVar("T")


def imported(module: str, what: str) -> Any:
    """Returns a module of an optional package.

    Args:
        what: what needs it, for the error.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES[module.partition(".")[0]]
        raise ImportError(f'{what} needs {package}: pip install "mmkernels[evaluation]"') from error


def bools(name: str, x: Values) -> Bools:
    """Returns `x` as bools ``[N]``; raises unless it is at least one bool, or 0 or 1, and nothing else."""
    array = _vector(name, x, "bools")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be bools, got {array.dtype}")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"{name} must be bools, or 0 and 1, got {array[first].item()!r} at {first}")
    return array.astype(np.bool_)


def floats(name: str, x: Values, must: str = "finite numbers", least: float = -np.inf, most: float = np.inf) -> Floats:
    """Returns `x` as float64 ``[N]``; raises unless there is one, and all are finite and in the range."""
    array = _vector(name, x, must)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be {must}, got {array.dtype}")
    array = array.astype(np.float64)
    wrong = ~(np.isfinite(array) & (array >= least) & (array <= most))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"{name} must be {must}, got {array[first].item()!r} at {first}")
    return array


def probabilities(name: str, x: Values) -> Floats:
    return floats(name, x, "probabilities from 0 to 1", 0.0, 1.0)


def check_lengths(
    name: str, x: Collection[object] | NDArray[Any], of: str, other: Collection[object] | NDArray[Any]
) -> None:
    """Raise ValueError unless there are as many of one argument as of the argument `of`."""
    if len(x) != len(other):
        raise ValueError(f"{name} must be {len(other)}, one for each of {of}, got {len(x)}")


def listed(name: str, x: Iterable[T], what: str) -> list[T]:
    """Returns a list of what a collection holds; raises if it is a string, no collection, or empty.

    Args:
        what: what it holds, in the plural.
    """
    if isinstance(x, str | bytes) or not isinstance(x, Iterable):
        raise TypeError(f"{name} must be {what}, got {type(x).__name__}")
    found = list(x)
    if not found:
        raise ValueError(f"{name} must be at least one of {what}, got none")
    return found


def texts(name: str, x: Iterable[str]) -> list[str]:
    """Returns the strings; raises unless there is at least one, and nothing else."""
    found = listed(name, x, "strings")
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, got {type(text).__name__} at {place}")
    return found


def whole(name: str, x: object, least: int, most: int | None = None) -> int:
    """Returns an int of the range; raises unless it is one."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
    if x < least or (most is not None and x > most):
        raise ValueError(f"{name} must be {f'>= {least}' if most is None else f'from {least} to {most}'}, got {x}")
    return int(x)


def share(name: str, x: object) -> float:
    """Returns a float above 0 and at most 1; raises unless it is one."""
    must = "above 0 and at most 1"
    number = check_number(name, x, must, 0.0, 1.0)
    if number == 0:
        raise ValueError(f"{name} must be {must}, got {x!r}")
    return number


def _vector(name: str, x: Any, must: str) -> NDArray[Any]:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        array = (x.double() if x.is_floating_point() else x).numpy()  # NumPy has no bfloat16
    else:
        try:
            array = np.asarray(x)
        except ValueError as error:
            raise ValueError(f"{name} must be {must} [N], got sequences of several lengths") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must be {must} [N], got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must be at least one, got none")
    return array
