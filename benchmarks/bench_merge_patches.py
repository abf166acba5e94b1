"""`merge_patches` beside the peers of token_peers.py."""

import token_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.tokens.merge_patches.spec import SPEC

test_merge_patches = rows_of(SPEC, token_peers.MERGE_PATCHES)
