"""`pool_tokens` beside the peers of token_peers.py."""

import token_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.tokens.pool_tokens.spec import SPEC

test_pool_tokens = rows_of(SPEC, token_peers.POOL_TOKENS)
