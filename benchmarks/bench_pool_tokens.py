"""`pool_tokens` beside the peers of grid_peers.py."""

import grid_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.tokens.pool_tokens.spec import SPEC

test_pool_tokens = rows_of(SPEC, grid_peers.POOL_TOKENS)
