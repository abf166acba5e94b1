"""The model families that `mmkernels support` checks, small and with random weights."""

from __future__ import annotations

from collections.abc import Sequence

from mmkernels.options import BadInput
from mmkernels.testing import decoders, omni, resampled, text, towers
from mmkernels.testing.models import Family

FAMILIES: dict[str, Family] = {
    family.name: family for module in (text, towers, resampled, decoders, omni) for family in module.FAMILIES
}
"""By name, in the order of the table."""


def find(names: Sequence[str]) -> list[Family]:
    """Returns the families of these names, or all of them if there are no names.

    Raises:
        BadInput: no family has this name.
    """
    for name in names:
        if name not in FAMILIES:
            raise BadInput(f"family must be one of {', '.join(FAMILIES)}; got {name!r}")
    return [FAMILIES[name] for name in names or FAMILIES]
