"""What the plans of the ops on visual tokens share: tiles of kernels that move rows, and that multiply them."""

from __future__ import annotations

from mmkernels.plan import TARGETS, Limit, Tiles

FLOAT32 = (512, 512, 512)
"""No limit to the tiles of `_MOVE`: rows that are moved are not multiplied."""
NO_SPILLS = Limit()
# (rows, columns, warps, stages): 16-bit channels are loaded and stored by 16 bytes a thread. Not timed yet.
_MOVE = ((16, 64, 4, 1), (16, 128, 4, 1), (16, 256, 4, 1))
# Chosen by registers and shared memory. Not timed yet.
_PRODUCT = {"sm_90": (128, 128, 8, 3), "sm_100": (128, 128, 8, 3), "gfx942": (128, 64, 8, 2)}
PRODUCT_TILES = {target: (_PRODUCT.get(target, (64, 64, 4, 2)),) for target in TARGETS}
"""Of kernels that multiply tokens with tokens, by architecture."""


def moving_tiles(*kernels: str) -> dict[str, Tiles]:
    """Returns the default tiles of kernels that move rows, by architecture."""
    return {target: dict.fromkeys(kernels, _MOVE) for target in TARGETS}
