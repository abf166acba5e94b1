"""`co_attention` beside the peers of attention_peers.py."""

import attention_peers

from mmkernels.bench.benchmark import rows_of
from mmkernels.ops.attention.co_attention.spec import SPEC

test_co_attention = rows_of(SPEC, attention_peers.CO_PEERS)
