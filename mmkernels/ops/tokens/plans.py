"""What the plans of the ops on visual tokens share: tiles of kernels that only move rows."""

from __future__ import annotations

from mmkernels.plan import TARGETS, Limit, Tiles

FLOAT32 = (512, 512, 512)
NO_SPILLS = Limit()
# (rows, columns, warps, stages): 16-bit channels are loaded and stored by 16 bytes a thread. Not timed yet.
_MOVE = ((16, 64, 4, 1), (16, 128, 4, 1), (16, 256, 4, 1))


def moving_tiles(*kernels: str) -> dict[str, Tiles]:
    """Returns the default tiles of kernels that move rows, by architecture."""
    return {target: dict.fromkeys(kernels, _MOVE) for target in TARGETS}
