"""`linear_cross_entropy` beside the peers of linear_peers.py."""

import linear_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.linear.linear_cross_entropy.spec import SPEC

test_linear_cross_entropy = rows_of(SPEC, linear_peers.CROSS_ENTROPY, counts_products=True)
