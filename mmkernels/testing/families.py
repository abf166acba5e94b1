"""The model families that `mmkernels support` checks, small and with random weights."""

from __future__ import annotations

from collections.abc import Sequence

from mmkernels.options import BadInput
from mmkernels.testing import (
    families_decoders,
    families_resampled,
    families_text,
    families_towers,
)
from mmkernels.testing.families_common import Family

FAMILIES: dict[str, Family] = {
    found.name: found
    for module in (families_text, families_towers, families_resampled, families_decoders)
    for found in vars(module).values()
    if isinstance(found, Family)
}
"""By name, in the order of the table."""


def find(names: Sequence[str]) -> list[Family]:
    """The families of these names; of all names where there are none.

    Raises:
        BadInput: no family has this name.
    """
    for name in names:
        if name not in FAMILIES:
            raise BadInput(f"family must be one of {', '.join(FAMILIES)}; got {name!r}")
    return [FAMILIES[name] for name in names or FAMILIES]
