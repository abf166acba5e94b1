"""`grouped_linear` beside the peers of grouped_peers.py."""

import grouped_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.linear.grouped_linear.spec import SPEC

test_grouped_linear = rows_of(SPEC, grouped_peers.PEERS)
