"""`merge_patches` beside the peers of grid_peers.py."""

import grid_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.tokens.merge_patches.spec import SPEC

test_merge_patches = rows_of(SPEC, grid_peers.MERGE_PATCHES)
