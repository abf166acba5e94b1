"""`cross_attention` beside the peers of attention_peers.py."""

import attention_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.attention.cross_attention.spec import SPEC

test_cross_attention = rows_of(SPEC, attention_peers.PEERS)
